//! What is fuzzed: one module a target, each with a `run` that takes the fuzzer's bytes and panics where the shipped code breaks
//! a promise. The targets for libFuzzer (`libfuzzer/fuzz_targets`) call these functions and do nothing else; `tests/corpus`
//! replays the committed corpus through them with a stable compiler.
//!
//! What must not live here: anything of the plugin rewritten to be fuzzed. What a target needs of it is public there.

pub mod check;
pub mod fields;
pub mod host;
pub mod lease_api;
pub mod leases;
pub mod lock_fence;
pub mod lock_header;
pub mod lock_name;
pub mod policy;
pub mod records;
pub mod table;
pub mod told;

/// A target: what it does with its input.
pub type Target = fn(&[u8]);

/// Every target under its name, which is also that of its file in `libfuzzer/fuzz_targets` and of its folder in `corpus`.
pub const TARGETS: [(&str, Target); 8] = [
    ("lease_api", lease_api::run),
    ("lock_fence", lock_fence::run),
    ("lock_header", lock_header::run),
    ("lock_name", lock_name::run),
    ("policy", policy::run),
    ("records", records::run),
    ("table", table::run),
    ("told", told::run),
];
