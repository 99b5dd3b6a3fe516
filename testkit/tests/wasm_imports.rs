//! The plugin's file as it ships: what it asks of its host, what it offers, and how large it is.

use std::collections::BTreeSet;

use interlock_testkit::tools;
use wasmparser::{ExternalKind, Parser, Payload, TypeRef};

/// What Envoy's proxy-wasm host serves of WASI.
const WASI: [&str; 12] = [
    "args_get",
    "args_sizes_get",
    "clock_time_get",
    "environ_get",
    "environ_sizes_get",
    "fd_close",
    "fd_fdstat_get",
    "fd_read",
    "fd_seek",
    "fd_write",
    "proc_exit",
    "random_get",
];

/// 1406 KiB: built for speed, which costs 200 KiB over built for size. What speaks to etcd (prost's messages, the keys' JSON) is 250 of them.
const LARGEST: usize = 1536 * 1024;

#[derive(Debug, Default)]
struct Module {
    imports: BTreeSet<(String, String)>,
    exports: BTreeSet<String>,
    odd: Vec<String>,
}

fn read(bytes: &[u8]) -> Module {
    let mut module = Module::default();
    for payload in Parser::new(0).parse_all(bytes) {
        match payload.unwrap() {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import.unwrap();
                    if !matches!(import.ty, TypeRef::Func(_)) {
                        module.odd.push(format!("{}.{} is no function", import.module, import.name));
                    }
                    module.imports.insert((import.module.to_owned(), import.name.to_owned()));
                }
            }
            Payload::ExportSection(section) => {
                let exports = section.into_iter().map(Result::unwrap);
                let functions = exports.filter(|e| e.kind == ExternalKind::Func);
                module.exports.extend(functions.map(|e| e.name.to_owned()));
            }
            _ => {}
        }
    }
    module
}

fn shipped() -> Vec<u8> {
    let path = tools::plugin_wasm().unwrap_or_else(|e| panic!("{e:#}"));
    std::fs::read(path).unwrap()
}

#[test]
fn the_plugin_imports_only_what_envoy_serves() {
    let module = read(&shipped());
    assert_eq!(module.odd, Vec::<String>::new());
    let served = |(from, name): &(String, String)| match from.as_str() {
        "env" => name.starts_with("proxy_"),
        "wasi_snapshot_preview1" => WASI.contains(&name.as_str()),
        _ => false,
    };
    let foreign = module.imports.iter().filter(|import| !served(import)).collect::<Vec<_>>();
    assert!(foreign.is_empty(), "Envoy does not serve {foreign:?}");
    assert!(module.imports.iter().any(|(from, _)| from == "env"), "it asks nothing of the host: is this the plugin?");
}

#[test]
fn the_plugin_exports_what_envoy_calls() {
    let module = read(&shipped());
    for name in ["proxy_abi_version_0_2_1", "proxy_on_context_create", "proxy_on_request_headers", "proxy_on_log"] {
        assert!(module.exports.contains(name), "{name} is not exported");
    }
}

#[test]
fn the_plugin_exports_no_callback_that_would_cost_every_request_for_nothing() {
    let module = read(&shipped());
    for name in ["proxy_on_response_body", "proxy_on_response_trailers", "proxy_on_downstream_data"] {
        assert!(!module.exports.contains(name), "{name} is exported");
    }
}

#[test]
fn the_plugin_is_small() {
    let size = shipped().len();
    assert!(size < LARGEST, "{size} bytes are not under {LARGEST}");
}
