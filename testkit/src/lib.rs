//! What Interlock's tests, demo and soak share: a real Envoy started from the bootstrap that ships, upstreams that do
//! as they are told and remember what they saw, clients that may misbehave, and the tools all this needs.
//!
//! No assertion about Interlock's rules lives here but [`Checker`]'s, which is the definition of mutual exclusion as an
//! upstream sees it. Nothing here sleeps for a fixed time to let something happen: see [`wait_for`].

pub mod checker;
pub mod client;
pub mod config;
pub mod envoy;
pub mod etcd;
pub mod link;
pub mod process;
pub mod raw;
pub mod relay;
pub mod stats;
pub mod tools;
pub mod upstream;
mod wait;

pub use checker::Checker;
pub use client::{Answer, Client};
pub use config::{EnvoyConfig, Route};
pub use envoy::Envoy;
pub use etcd::Etcd;
pub use link::{Direction, Link};
pub use raw::{RawClient, RawResponse};
pub use relay::Relay;
pub use upstream::{Ended, Recorded, Reply, Upstream};
pub use wait::{DEADLINE, wait_for, wait_for_async};
