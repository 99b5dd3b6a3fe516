//! The corpus: what the repository keeps (`fuzz/corpus`), and what runs found (in the target directory).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result};
use interlock_testkit::tools;

use super::{place, run, scratch};

/// The seeds of the repository.
pub fn kept(target: &str) -> Result<PathBuf> {
    place(&tools::root().join("fuzz/corpus"), target)
}

/// The inputs that runs on this machine found.
pub fn found(target: &str) -> Result<PathBuf> {
    place(&scratch().join("found"), target)
}

/// Copies what covers more than the repository's seeds do to them.
pub fn keep(programs: &Path, target: &str) -> Result<()> {
    let (kept, found) = (kept(target)?, found(target)?);
    let before = contents(&kept)?;
    // By the edges alone: how often each was passed makes for thousands of inputs.
    merge(programs, target, &kept, &found, &["-use_counters=0"])?;
    let mut new = 0;
    for (path, content) in contents(&kept)? {
        if !before.contains_key(&path) && !before.values().any(|there| *there == content) {
            let name = path.file_name().context("a file without a name")?.to_string_lossy().into_owned();
            fs::rename(&path, path.with_file_name(format!("found-{}", name.get(..16).unwrap_or(&name))))?;
            new += 1;
        }
    }
    println!("{target}: {new} seeds more");
    Ok(())
}

/// What seeds stay for their own sake begin with: schedules with a meaning, and inputs that once failed. Coverage does not see
/// in which order things happen.
const SPARED: [&str; 3] = ["case-", "own-", "found-by-"];

/// Drops the seeds that cover nothing of their own.
pub fn minimise(programs: &Path, target: &str) -> Result<()> {
    let kept = kept(target)?;
    let least = scratch().join("least").join(target);
    if least.is_dir() {
        fs::remove_dir_all(&least)?;
    }
    fs::create_dir_all(&least)?;
    merge(programs, target, &least, &kept, &[])?;
    let needed: BTreeSet<Vec<u8>> = contents(&least)?.into_values().collect();
    let (mut stay, mut bytes) = (0, 0);
    for (path, content) in contents(&kept)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if needed.contains(&content) || SPARED.iter().any(|spared| name.starts_with(spared)) {
            stay += 1;
            bytes += content.len();
        } else {
            fs::remove_file(&path)?;
        }
    }
    println!("{target}: {stay} seeds, {bytes} bytes");
    Ok(())
}

fn merge(programs: &Path, target: &str, into: &Path, from: &Path, flags: &[&str]) -> Result<()> {
    let mut command = run::command(programs, target);
    command.arg("-merge=1").args(flags).arg(into).arg(from).stdout(Stdio::null()).stderr(Stdio::null());
    tools::run(&mut command)
}

fn contents(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    entries
        .map(|entry| {
            let path = entry?.path();
            let content = fs::read(&path)?;
            Ok((path, content))
        })
        .collect()
}
