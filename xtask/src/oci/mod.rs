//! `cargo xtask oci`: the plugin as the image that Istio loads, as files. Nothing here speaks to a registry.
//!
//! It is the "compat" variant of the Wasm image specification: an ordinary OCI image whose last layer holds
//! `plugin.wasm`. Istio takes it, and so does everything that copies, signs, scans or mounts images. The same plugin and the
//! same options give the same bytes, and so the same digest.

#[cfg(test)]
mod tests;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use flate2::{Compression, GzBuilder};
use interlock_testkit::tools;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::wasm;

/// The one file of the image: the name that Istio looks for.
const FILE: &str = "plugin.wasm";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

#[derive(Debug, Args)]
pub struct OciArgs {
    /// Where the layout goes: what an earlier run left there is replaced
    #[arg(long, value_name = "DIR", default_value = "dist/oci")]
    out: PathBuf,
    /// The image's tag
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// The commit that the plugin was built from, for org.opencontainers.image.revision
    #[arg(long)]
    revision: Option<String>,
    /// Where its source is, for org.opencontainers.image.source
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// Its licences as an SPDX expression, for org.opencontainers.image.licenses
    #[arg(long, value_name = "SPDX")]
    licenses: Option<String>,
    /// The architecture that the image claims. Nothing in it is of any, but what mounts images asks for its own
    #[arg(long, default_value = "amd64")]
    architecture: String,
    /// Pack the plugin that is there, without building it first
    #[arg(long)]
    no_build: bool,
}

/// What names a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Blob {
    digest: String,
    size: usize,
}

pub fn run(args: &OciArgs) -> Result<()> {
    if !args.no_build {
        wasm::shipped()?;
    }
    let plugin = tools::plugin_wasm()?;
    let module = fs::read(&plugin).with_context(|| format!("cannot read {}", plugin.display()))?;
    let image = pack(&module, args)?;
    let (out, tag) = (args.out.display(), &args.tag);
    let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
    println!("{out}: an OCI image layout; {FILE} has {} KiB", module.len() / 1024);
    println!("  the image   {}   spec.sha256 of a WasmPlugin with url: oci://…", hex(&image.digest));
    println!("  the module  {}   spec.sha256 of a WasmPlugin with url: https://…", hex(&sha256(&module)));
    println!("To put it into a registry, with either of:");
    println!("  skopeo copy oci:{out}:{tag} docker://REGISTRY/interlock:{tag}");
    println!("  crane push {out} REGISTRY/interlock:{tag}");
    Ok(())
}

/// Writes the layout, and gives back the image's manifest.
fn pack(module: &[u8], args: &OciArgs) -> Result<Blob> {
    ensure!(module.starts_with(b"\0asm"), "that is no WebAssembly module");
    ensure!(is_tag(&args.tag), "{:?} is no tag: 1 to 128 of A-Z a-z 0-9 _ . -, no . or - first", args.tag);
    // Istio's module is a file in a tar in a gzip; the digest in the config is the tar's.
    let tar = tar(module)?;
    let layer = gzip(&tar)?;
    let root = tools::root().join(&args.out);
    clear(&root)?;
    let blobs = root.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("cannot make {}", blobs.display()))?;
    let write = |bytes: &[u8]| -> Result<Blob> {
        let digest = sha256(bytes);
        let path = blobs.join(digest.trim_start_matches("sha256:"));
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Blob { digest, size: bytes.len() })
    };
    let annotations = annotations(args);
    let config = write(&text(&json!({
        "architecture": args.architecture,
        "os": "linux",
        "config": { "Labels": annotations },
        "rootfs": { "type": "layers", "diff_ids": [sha256(&tar)] },
    }))?)?;
    let layer = write(&layer)?;
    let mut on_manifest = annotations;
    on_manifest.insert("module.wasm.image/variant".into(), json!("compat"));
    let manifest = write(&text(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": { "mediaType": CONFIG, "digest": config.digest, "size": config.size },
        "layers": [{ "mediaType": LAYER, "digest": layer.digest, "size": layer.size }],
        "annotations": on_manifest,
    }))?)?;
    let index = text(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": MANIFEST,
            "digest": manifest.digest,
            "size": manifest.size,
            "annotations": { "org.opencontainers.image.ref.name": args.tag },
        }],
    }))?;
    fs::write(root.join("oci-layout"), text(&json!({ "imageLayoutVersion": "1.0.0" }))?)?;
    fs::write(root.join("index.json"), index)?;
    Ok(manifest)
}

/// Removes an earlier layout, and nothing that is none.
fn clear(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let is_empty = || fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(root.join("oci-layout").is_file() || is_empty(), "{} is there and is no OCI layout", root.display());
    fs::remove_dir_all(root).with_context(|| format!("cannot remove {}", root.display()))
}

fn annotations(args: &OciArgs) -> Map<String, Value> {
    let said = [
        ("title", Some("interlock")),
        ("description", Some("A lock manager that lives in the proxy: a proxy-wasm plugin for Envoy and Istio")),
        ("version", Some(env!("CARGO_PKG_VERSION"))),
        ("revision", args.revision.as_deref()),
        ("source", args.source.as_deref()),
        ("licenses", args.licenses.as_deref()),
    ];
    let key = |name: &str| format!("org.opencontainers.image.{name}");
    said.into_iter().filter_map(|(name, value)| Some((key(name), json!(value?)))).collect()
}

/// A tar of the module alone, without what differs from one machine or run to the next.
fn tar(module: &[u8]) -> Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(u64::try_from(module.len())?);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header, FILE, module)?;
    Ok(tar.into_inner()?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    Ok(gzip.finish()?)
}

/// Whether it can be an image's tag.
fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&text.len())
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || b".-".contains(&byte))
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn text(value: &Value) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}
