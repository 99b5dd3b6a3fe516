//! `cargo xtask wasm`: the plugin, built for its host and made small.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use interlock_testkit::tools;
use wasm_encoder::reencode::{self, Reencode};
use wasm_encoder::{ExportSection, Module};

/// The plugin's target: the one with randomness that Envoy serves.
pub const TARGET: &str = "wasm32-wasip1";

/// The profile that it is built in.
const PROFILE: &str = "plugin";

/// What rustc's output for [`TARGET`] may use. Named one by one: Debian's binaryen reads no feature section of today's
/// compilers, and `--all-features` would let the optimizer write what Envoy's engine does not take.
const FEATURES: [&str; 6] = [
    "--enable-bulk-memory",
    "--enable-sign-ext",
    "--enable-mutable-globals",
    "--enable-nontrapping-float-to-int",
    "--enable-multivalue",
    "--enable-reference-types",
];

/// Callbacks that the SDK exports for every plugin and this one has no use for. The host calls whatever is exported: the body
/// and the trailers of each response would cost a request two ways into the VM and back, for nothing.
const UNUSED: [&str; 8] = [
    "proxy_on_response_body",
    "proxy_on_response_trailers",
    "proxy_on_new_connection",
    "proxy_on_downstream_data",
    "proxy_on_downstream_connection_close",
    "proxy_on_upstream_data",
    "proxy_on_upstream_connection_close",
    "proxy_on_foreign_function",
];

/// A module without the exports of [`UNUSED`].
struct Trimmed;

impl Reencode for Trimmed {
    type Error = std::convert::Infallible;

    fn parse_export(
        &mut self,
        exports: &mut ExportSection,
        export: wasmparser::Export<'_>,
    ) -> Result<(), reencode::Error<Self::Error>> {
        if UNUSED.contains(&export.name) {
            return Ok(());
        }
        reencode::utils::parse_export(self, exports, export)
    }
}

#[derive(Debug, Default, Args)]
pub struct WasmArgs {
    /// Only type-check the plugin for its target, both ways; write nothing
    #[arg(long)]
    check: bool,
}

/// One way to build the plugin.
struct Build {
    package: &'static str,
    file: &'static str,
    features: &'static [&'static str],
    /// Where it is built, below the target directory: builds with different features would else undo each other.
    below: &'static str,
}

/// The plugin as it ships.
const SHIPPED: Build = Build { package: "interlock", file: "interlock.wasm", features: &[], below: "" };

/// The plugin that tests can kill.
const FAULTS: Build = Build {
    package: "interlock",
    file: "interlock-faults.wasm",
    features: &["--features", "fault-injection"],
    below: "faults",
};

/// The filters that the bench compares it with.
const BENCH_FILTERS: Build = Build { package: "bench-filters", file: "bench-filters.wasm", features: &[], below: "" };

pub fn run(args: &WasmArgs) -> Result<()> {
    tools::rust_targets(&[TARGET])?;
    if args.check {
        return [SHIPPED, FAULTS].iter().try_for_each(|build| tools::run(&mut build.cargo("check")));
    }
    shipped()?;
    FAULTS.make(tools::wasm_opt().as_deref())
}

/// Builds the plugin as it ships, and not the one for tests.
pub fn shipped() -> Result<()> {
    tools::rust_targets(&[TARGET])?;
    let optimizer = tools::wasm_opt();
    if optimizer.is_none() {
        eprintln!("without wasm-opt the plugin is larger than it need be: apt-get install binaryen");
    }
    SHIPPED.make(optimizer.as_deref())
}

/// Builds the filters that the bench compares the plugin with.
pub fn make_bench_filters() -> Result<()> {
    tools::rust_targets(&[TARGET])?;
    BENCH_FILTERS.make(tools::wasm_opt().as_deref())
}

/// Where they are.
pub fn bench_filters() -> PathBuf {
    tools::root().join("dist").join(BENCH_FILTERS.file)
}

impl Build {
    fn target_dir(&self) -> PathBuf {
        let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = set("CARGO_TARGET_DIR").or_else(|| set("CARGO_BUILD_TARGET_DIR"));
        tools::root().join(base.unwrap_or_else(|| "target".into())).join(self.below)
    }

    fn cargo(&self, command: &str) -> Command {
        let mut cargo = tools::cargo();
        cargo.args([
            command,
            "--profile",
            PROFILE,
            "--package",
            self.package,
            "--lib",
            "--target",
            TARGET,
            "--target-dir",
        ]);
        cargo.arg(self.target_dir()).args(self.features);
        cargo
    }

    fn make(&self, optimizer: Option<&Path>) -> Result<()> {
        tools::run(&mut self.cargo("build"))?;
        let built =
            self.target_dir().join(TARGET).join(PROFILE).join(format!("{}.wasm", self.package.replace('-', "_")));
        let dist = tools::root().join("dist");
        fs::create_dir_all(&dist)?;
        // Renamed into place, so that an Envoy that starts meanwhile reads the old plugin or the new one.
        let next = dist.join(format!("{}.{}", self.file, std::process::id()));
        let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        let mut trimmed = Module::new();
        let parser = wasmparser::Parser::new(0);
        Trimmed.parse_core_module(&mut trimmed, parser, &bytes).context("cannot read what rustc made")?;
        fs::write(&next, trimmed.finish()).with_context(|| format!("cannot write {}", next.display()))?;
        // What is not optimized stays as it is: the optimizer writes nothing where it fails.
        let optimized = optimizer.is_some_and(|optimizer| {
            let mut command = Command::new(optimizer);
            command.arg("-O3").args(FEATURES).arg(&next).arg("-o").arg(&next);
            tools::run(&mut command).inspect_err(|e| eprintln!("keeping the plugin as rustc made it: {e:#}")).is_ok()
        });
        let out = dist.join(self.file);
        fs::rename(&next, &out).with_context(|| format!("cannot write {}", out.display()))?;
        let kib = |path: &Path| fs::metadata(path).map(|meta| meta.len().div_ceil(1024));
        let how = if optimized { "optimized by wasm-opt" } else { "not optimized by wasm-opt" };
        println!("dist/{}: {} KiB, {how} ({} KiB as rustc made it)", self.file, kib(&out)?, kib(&built)?);
        Ok(())
    }
}
