//! The lease API: leases and the table over HTTP, for programs that hold a lock over several requests, for sidecars whose
//! authority this proxy is, and for people who look.
//!
//! Pure: bytes in, calls out ([`call`]); values in, JSON out ([`body`]); receipts are sealed and opened here ([`receipt`]).
//! Must not live here: anything that calls the host, and what a call does.

pub mod body;
pub mod call;
pub mod receipt;
pub mod told;
#[cfg(test)]
mod told_tests;

pub use call::{ApiError, Target};

/// The longest body of a request, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
