//! `cargo xtask lint`: format, lints and docs. What runs as wasm is linted as wasm too.

use anyhow::Result;
use interlock_testkit::tools;

use crate::wasm;

const CORE_TARGET: &str = "wasm32-unknown-unknown";

pub fn run() -> Result<()> {
    tools::rust_targets(&[wasm::TARGET, CORE_TARGET])?;
    let deny = ["--", "-D", "warnings"];
    let plugin = ["clippy", "--package", "interlock", "--lib", "--target", wasm::TARGET];
    let core = ["clippy", "--package", "interlock-core", "--all-targets", "--target", CORE_TARGET];
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["fmt", "--manifest-path", "fuzz/libfuzzer/Cargo.toml", "--check"])?;
    cargo(&[&["clippy", "--workspace", "--all-targets"], &deny[..]].concat())?;
    cargo(&[&plugin[..], &deny[..]].concat())?;
    cargo(&[&plugin[..], &["--features", "fault-injection"], &deny[..]].concat())?;
    let filters = ["clippy", "--package", "bench-filters", "--lib", "--target", wasm::TARGET];
    cargo(&[&filters[..], &deny[..]].concat())?;
    cargo(&[&core[..], &deny[..]].concat())?;
    cargo(&["doc", "--workspace", "--no-deps"])
}

fn cargo(args: &[&str]) -> Result<()> {
    println!("== cargo {}", args.join(" "));
    let flags = std::env::var("RUSTDOCFLAGS").unwrap_or_default();
    tools::run(tools::cargo().args(args).env("RUSTDOCFLAGS", format!("{flags} -D warnings")))
}
