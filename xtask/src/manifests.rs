//! `cargo xtask manifests`: checks manifests for a mesh, before a cluster gets them.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use interlock_testkit::tools;

#[derive(Debug, Args)]
pub struct ManifestsArgs {
    /// The files; those of envoy/istio where none is named
    files: Vec<PathBuf>,
}

pub fn run(args: &ManifestsArgs) -> Result<()> {
    let folder = tools::root().join("envoy/istio");
    let mut files = args.files.clone();
    if files.is_empty() {
        files.extend(std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path())));
        files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
        files.sort();
    }
    // A process of its own: Kubernetes' types take a while to build, and no other command needs them. It has the folder that
    // this one was called in.
    let mut cargo = tools::cargo();
    cargo.args(["run", "--quiet", "--manifest-path"]).arg(tools::root().join("manifests/Cargo.toml"));
    tools::run(cargo.current_dir(std::env::current_dir()?).arg("--").args(files))
}
