//! Interlock in a real Envoy with two workers: what callers, upstreams and operators see of it.
//!
//! Every test ends by showing that nothing is left behind. Nothing here sleeps to let something happen: a test waits for
//! what it needs to see, with a deadline.

// Tests may panic: that is how they fail. The plugin may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]

mod common;
mod problem;
mod sidecar;
mod world;

mod api;
mod audit;
mod authority;
mod ends;
mod etcd;
mod faults;
mod grants;
mod guard;
mod hostile;
mod istio;
mod leased;
mod leases;
mod matching;
mod mtls;
mod reentry;
mod refusals;
mod reload;
mod telemetry;
mod wire;
