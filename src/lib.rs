//! Interlock, the plugin: a lock manager that lives in the proxy.
//!
//! The rules about locks live in [`interlock_core`]; what the host is asked lives in `host`.

pub mod annotation;
pub mod answer;
pub mod api;
pub mod backend;
pub mod filter;
pub mod host;
pub mod policy;
pub mod telemetry;

#[cfg(target_arch = "wasm32")]
mod entry;
#[cfg(feature = "fault-injection")]
mod fault;
