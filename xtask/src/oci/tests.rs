//! The layout is read again as registries, runtimes and Istio read it.

use std::io::Read as _;

use flate2::read::GzDecoder;
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};

use super::*;

/// A module as far as anything here looks into it; long enough to be compressed.
fn module() -> Vec<u8> {
    let body = (0..100_000u32).flat_map(|n| n.wrapping_mul(n).to_le_bytes());
    b"\0asm\x01\0\0\0".iter().copied().chain(body).collect()
}

fn args(out: &Path) -> OciArgs {
    OciArgs {
        out: out.to_owned(),
        tag: "1.2.3".into(),
        revision: Some("0123456789abcdef0123456789abcdef01234567".into()),
        source: Some("https://example.com/interlock".into()),
        licenses: Some("Apache-2.0".into()),
        architecture: "amd64".into(),
        no_build: true,
    }
}

/// A layout, read strictly: every blob has the size and the digest that it is named with.
struct Layout(PathBuf);

impl Layout {
    fn blob(&self, descriptor: &Descriptor) -> Vec<u8> {
        let hex = descriptor.digest().digest();
        let bytes = fs::read(self.0.join("blobs").join(descriptor.digest().algorithm().as_ref()).join(hex)).unwrap();
        assert_eq!(u64::try_from(bytes.len()).unwrap(), descriptor.size(), "{hex}");
        assert_eq!(sha256(&bytes), format!("sha256:{hex}"));
        bytes
    }

    /// The only image, and what names it.
    fn image(&self) -> (Descriptor, ImageManifest) {
        let version: Value = serde_json::from_slice(&fs::read(self.0.join("oci-layout")).unwrap()).unwrap();
        assert_eq!(version, json!({ "imageLayoutVersion": "1.0.0" }));
        let index = ImageIndex::from_file(self.0.join("index.json")).unwrap();
        let [descriptor] = &index.manifests()[..] else { panic!("{index:?}") };
        assert_eq!(*descriptor.media_type(), MediaType::ImageManifest);
        (descriptor.clone(), ImageManifest::from_reader(&self.blob(descriptor)[..]).unwrap())
    }

    /// The module that Istio's agent finds, as `PrepareFetch` in its `pkg/wasm/imagefetcher.go` goes about it.
    fn istio(&self) -> Result<Vec<u8>, String> {
        let (_, manifest) = self.image();
        let layers = manifest.layers();
        if manifest.media_type().as_ref().map(ToString::to_string).as_deref()
            == Some("application/vnd.docker.distribution.manifest.v2+json")
        {
            return Err("taken for a Docker image".into());
        }
        // extractOCIStandardImage: the last layer, whatever came before it.
        let last = layers.last().ok_or("number of layers must be greater than zero")?;
        if last.media_type().to_string() != "application/vnd.oci.image.layer.v1.tar+gzip" {
            return Err(format!("invalid media type {}", last.media_type()));
        }
        // extractWasmPluginBinary: the first file of that base name.
        let blob = self.blob(last);
        let mut tar = tar::Archive::new(GzDecoder::new(&blob[..]));
        for entry in tar.entries().map_err(|error| error.to_string())? {
            let mut entry = entry.map_err(|error| error.to_string())?;
            if entry.path().unwrap().file_name().is_some_and(|name| name == "plugin.wasm") {
                let mut module = Vec::new();
                entry.read_to_end(&mut module).map_err(|error| error.to_string())?;
                return Ok(module);
            }
        }
        Err("plugin.wasm not found in the archive".into())
    }
}

#[test]
fn istio_finds_the_module_in_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("oci");
    let image = pack(&module(), &args(&out)).unwrap();
    let layout = Layout(out);
    assert!(layout.istio().unwrap() == module());
    let (descriptor, manifest) = layout.image();
    assert_eq!(descriptor.digest().to_string(), image.digest);
    let of_descriptor = descriptor.annotations().clone().unwrap();
    assert_eq!(of_descriptor["org.opencontainers.image.ref.name"], "1.2.3", "what oci:DIR:TAG looks for");

    let said = manifest.annotations().clone().unwrap();
    assert_eq!(said["module.wasm.image/variant"], "compat");
    assert_eq!(said["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(said["org.opencontainers.image.revision"], "0123456789abcdef0123456789abcdef01234567");
    assert_eq!(said["org.opencontainers.image.source"], "https://example.com/interlock");
    assert_eq!(said["org.opencontainers.image.licenses"], "Apache-2.0");
}

/// What a kubelet needs that mounts the image, beside the layer.
#[test]
fn the_config_is_that_of_an_image_of_one_layer() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("oci");
    pack(&module(), &OciArgs { architecture: "arm64".into(), ..args(&out) }).unwrap();
    let layout = Layout(out);
    let (_, manifest) = layout.image();
    assert_eq!(*manifest.config().media_type(), MediaType::ImageConfig);
    let config = ImageConfiguration::from_reader(&layout.blob(manifest.config())[..]).unwrap();
    assert_eq!((config.os(), config.architecture()), (&Os::Linux, &Arch::ARM64));
    let [layer] = &manifest.layers()[..] else { panic!("{manifest:?}") };
    let blob = layout.blob(layer);
    let mut tar = Vec::new();
    GzDecoder::new(&blob[..]).read_to_end(&mut tar).unwrap();
    assert_eq!(*config.rootfs().diff_ids(), [sha256(&tar)]);
    let mut archive = tar::Archive::new(&tar[..]);
    let entries: Vec<_> = archive.entries().unwrap().map(Result::unwrap).collect();
    let [file] = &entries[..] else { panic!("{} files", entries.len()) };
    let header = file.header();
    assert_eq!(header.mode().unwrap(), 0o644, "anyone may read it");
    assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, 0));
}

#[test]
fn the_same_plugin_gives_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, other] = ["one", "two", "other"].map(|name| args(&dir.path().join(name)));
    let first = pack(&module(), &one).unwrap();
    assert_eq!(pack(&module(), &two).unwrap(), first);
    assert_eq!(pack(&module(), &one).unwrap(), first, "over an earlier one");
    let files = |args: &OciArgs| {
        let blobs = fs::read_dir(args.out.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().file_name());
        let mut blobs: Vec<_> = blobs.collect();
        blobs.sort();
        (fs::read(args.out.join("index.json")).unwrap(), blobs)
    };
    assert_eq!(files(&one), files(&two));
    assert_eq!(files(&one).1.len(), 3, "nothing of an earlier one is left");
    let other = pack(&module(), &OciArgs { revision: None, ..other }).unwrap();
    assert_ne!(other.digest, first.digest);
}

#[test]
fn what_cannot_be_an_image_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |module: &[u8], change: fn(&mut OciArgs)| {
        let mut args = args(&dir.path().join("oci"));
        change(&mut args);
        pack(module, &args).unwrap_err().to_string()
    };
    assert!(refusal(b"\x7fELF", |_| ()).contains("no WebAssembly module"));
    for tag in ["", "a b", ".a", "-a", "a:b", "a/b", "ü"] {
        assert!(!is_tag(tag), "{tag}");
    }
    assert!(refusal(&module(), |args| args.tag = "a/b".into()).contains("is no tag"));
    // A folder that somebody names by mistake keeps what is in it.
    fs::create_dir_all(dir.path().join("oci")).unwrap();
    fs::write(dir.path().join("oci/thesis.txt"), "years").unwrap();
    assert!(refusal(&module(), |_| ()).contains("is no OCI layout"));
    assert_eq!(fs::read(dir.path().join("oci/thesis.txt")).unwrap(), b"years");
}
