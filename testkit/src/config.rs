//! The bootstrap an [`Envoy`](crate::Envoy) of ours runs with: the one that ships, with what a test needs changed in it.
//!
//! Everything is one JSON value (Envoy reads JSON as it reads YAML), so that a test can patch any corner of it. No file
//! is written and no process started here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::tools;

/// The name of the filter under test, in the bootstrap that ships and in tests.
pub const FILTER: &str = "interlock";
/// The cluster that [`EnvoyConfig::upstream`] makes.
pub const UPSTREAM: &str = "upstream";
const ROUTER: &str = "envoy.filters.http.router";
const HCM: &str = "envoy.filters.network.http_connection_manager";

/// A bootstrap in the making, and the arguments Envoy is started with.
#[derive(Debug, Clone)]
pub struct EnvoyConfig {
    pub(crate) bootstrap: Value,
    pub(crate) concurrency: u32,
    pub(crate) log_levels: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) listener_from_file: bool,
}

impl EnvoyConfig {
    /// `envoy/local.yaml`, as it ships.
    ///
    /// # Panics
    /// When the file is not there or is not YAML.
    pub fn local() -> Self {
        Self::from_file(&tools::root().join("envoy/local.yaml")).unwrap_or_else(|e| panic!("{e:#}"))
    }

    /// Any other bootstrap in YAML.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut yaml: serde_yaml_ng::Value =
            serde_yaml_ng::from_str(&text).with_context(|| format!("{} is not YAML", path.display()))?;
        yaml.apply_merge().with_context(|| format!("a merge key in {}", path.display()))?;
        Ok(Self::from_value(serde_json::to_value(yaml).with_context(|| format!("{} is not JSON", path.display()))?))
    }

    /// A small Envoy without Interlock: one listener, one router, no route yet. What the testkit tests itself with,
    /// and what a cost is compared to.
    pub fn plain() -> Self {
        Self::from_value(json!({
            "admin": { "address": socket_address(([127, 0, 0, 1], 0).into()) },
            "static_resources": {
                "listeners": [{
                    "name": "plain",
                    "address": socket_address(([127, 0, 0, 1], 0).into()),
                    "filter_chains": [{ "filters": [{
                        "name": HCM,
                        "typed_config": {
                            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                            "stat_prefix": "plain",
                            "access_log": [{
                                "name": "envoy.access_loggers.stdout",
                                "typed_config": {
                                    "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
                                    "log_format": { "json_format": {
                                        "method": "%REQ(:METHOD)%", "path": "%REQ(:PATH)%", "status": "%RESPONSE_CODE%",
                                        "details": "%RESPONSE_CODE_DETAILS%", "flags": "%RESPONSE_FLAGS%",
                                    } },
                                },
                            }],
                            "http_filters": [{
                                "name": ROUTER,
                                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
                            }],
                            "route_config": {
                                "name": "plain",
                                "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [] }],
                            },
                        },
                    }] }],
                }],
                "clusters": [],
            },
        }))
    }

    /// Any bootstrap.
    pub fn from_value(bootstrap: Value) -> Self {
        Self {
            bootstrap,
            concurrency: 2,
            log_levels: "wasm:info".to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            listener_from_file: false,
        }
    }

    /// The bootstrap as it is so far.
    pub fn bootstrap(&self) -> &Value {
        &self.bootstrap
    }

    /// The number of worker threads. Default: 2.
    pub fn concurrency(mut self, workers: u32) -> Self {
        self.concurrency = workers;
        self
    }

    /// Envoy's `--component-log-level`. Default: `wasm:info`; the rest logs warnings.
    pub fn log_levels(mut self, levels: &str) -> Self {
        self.log_levels = levels.to_owned();
        self
    }

    /// One more argument for Envoy.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// A variable of Envoy's environment: a secret that the bootstrap names.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Gives Envoy its listeners by a watched file instead of in the bootstrap, so that
    /// [`Envoy::update_policy`](crate::Envoy::update_policy) can change them while it runs.
    pub fn listener_from_file(mut self) -> Self {
        self.listener_from_file = true;
        self
    }

    /// The policy, in place of the one that ships, as JSON text: the plugin gets these very bytes.
    pub fn policy(self, policy: Value) -> Self {
        self.policy_text(&policy.to_string())
    }

    /// The policy as a text, which may be no policy and no JSON.
    pub fn policy_text(self, text: &str) -> Self {
        self.configuration(string_value(text))
    }

    /// The policy as a Struct, which Envoy hands to the plugin in protobuf's encoding.
    pub fn policy_struct(self, policy: Value) -> Self {
        self.configuration(json!({ "@type": "type.googleapis.com/google.protobuf.Struct", "value": policy }))
    }

    /// Changes the policy that is there and leaves it the type it has.
    ///
    /// # Panics
    /// When it is a text that is not JSON.
    pub fn patch_policy(self, mut patch: impl FnMut(&mut Value)) -> Self {
        self.patch_plugin(|config| {
            let value = &mut config["configuration"]["value"];
            match value.as_str() {
                None => patch(value),
                Some(text) => {
                    let mut policy =
                        serde_json::from_str(text).unwrap_or_else(|e| panic!("the policy is not JSON: {e}"));
                    patch(&mut policy);
                    *value = json!(policy.to_string());
                }
            }
        })
    }

    /// The plugin's file. Default: [`tools::plugin_wasm`].
    pub fn wasm(self, path: &Path) -> Self {
        let path = path.to_string_lossy().into_owned();
        self.patch_plugin(|config| config["vm_config"]["code"] = json!({ "local": { "filename": path } }))
    }

    /// The build with fault injection in place of the one that ships.
    ///
    /// # Panics
    /// When it has not been built.
    pub fn with_faults(self) -> Self {
        let path = tools::faults_wasm().unwrap_or_else(|e| panic!("{e:#}"));
        self.wasm(&path)
    }

    /// The VM's id: the scope of shared data.
    pub fn vm_id(self, id: &str) -> Self {
        self.patch_plugin(|config| config["vm_config"]["vm_id"] = json!(id))
    }

    /// Puts `disabled: true` on the filter, so that it runs only on routes that say so.
    pub fn disabled(self) -> Self {
        self.patch_filters(|filters| {
            for filter in filters.iter_mut().filter(|f| f["name"] == FILTER) {
                filter["disabled"] = json!(true);
            }
        })
    }

    /// Takes the filter out.
    pub fn without_interlock(self) -> Self {
        self.patch_filters(|filters| filters.retain(|f| f["name"] != FILTER))
    }

    /// Sends everything to one upstream: replaces all routes by one that takes every path to the cluster `upstream` at
    /// `address`, over the protocol that the client speaks, for at most 15 s.
    pub fn upstream(self, address: SocketAddr) -> Self {
        self.cluster(UPSTREAM, address).patch_routes(|routes| *routes = vec![Route::prefix("/").named("all").0.clone()])
    }

    /// Points the cluster `name`, which must be there, at all of these addresses.
    ///
    /// # Panics
    /// When there is no such cluster.
    pub fn endpoints(mut self, name: &str, addresses: &[SocketAddr]) -> Self {
        let all: Vec<_> =
            addresses.iter().map(|at| json!({ "endpoint": { "address": socket_address(*at) } })).collect();
        let clusters = array(&mut self.bootstrap["static_resources"]["clusters"]);
        let cluster = clusters.iter_mut().find(|c| c["name"] == name).unwrap_or_else(|| panic!("no cluster {name}"));
        cluster["load_assignment"]["endpoints"] = json!([{ "lb_endpoints": all }]);
        self
    }

    /// Points the cluster `name` at `address`; makes it where there is none. A made one speaks to the upstream the
    /// protocol that the client speaks.
    pub fn cluster(mut self, name: &str, address: SocketAddr) -> Self {
        let assignment = json!({
            "cluster_name": name,
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket_address(address) } }] }],
        });
        let clusters = &mut self.bootstrap["static_resources"]["clusters"];
        if clusters.is_null() {
            *clusters = json!([]);
        }
        let clusters = array(clusters);
        match clusters.iter_mut().find(|c| c["name"] == name) {
            Some(cluster) => cluster["load_assignment"] = assignment,
            None => clusters.push(json!({
                "name": name,
                "type": "STATIC",
                "connect_timeout": "1s",
                "load_assignment": assignment,
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "use_downstream_protocol_config": { "http2_protocol_options": {} },
                    },
                },
            })),
        }
        self
    }

    /// Puts a route before those that are there.
    pub fn route(self, route: Route) -> Self {
        self.patch_routes(|routes| routes.insert(0, route.0.clone()))
    }

    /// Puts an HTTP filter right before Interlock's (before the router where there is none).
    pub fn filter_before(self, filter: Value) -> Self {
        self.patch_filters(|filters| {
            let at = filters.iter().position(|f| f["name"] == FILTER || f["name"] == ROUTER).unwrap_or(0);
            filters.insert(at, filter.clone());
        })
    }

    /// Puts an HTTP filter right after Interlock's (before the router where there is none).
    pub fn filter_after(self, filter: Value) -> Self {
        self.patch_filters(|filters| {
            let after = filters.iter().position(|f| f["name"] == FILTER).map(|at| at + 1);
            let router = || filters.iter().position(|f| f["name"] == ROUTER).unwrap_or(0);
            filters.insert(after.unwrap_or_else(router), filter.clone());
        })
    }

    /// Changes anything in the whole bootstrap.
    pub fn patch(mut self, patch: impl FnOnce(&mut Value)) -> Self {
        patch(&mut self.bootstrap);
        self
    }

    /// Changes every HTTP connection manager (its `typed_config`).
    pub fn patch_hcm(mut self, mut patch: impl FnMut(&mut Value)) -> Self {
        for listener in array(&mut self.bootstrap["static_resources"]["listeners"]) {
            each_hcm(listener, &mut patch);
        }
        self
    }

    /// Changes the routes of every virtual host.
    pub fn patch_routes(self, mut patch: impl FnMut(&mut Vec<Value>)) -> Self {
        self.patch_hcm(|hcm| {
            for host in array(&mut hcm["route_config"]["virtual_hosts"]) {
                patch(array(&mut host["routes"]));
            }
        })
    }

    /// Changes the list of HTTP filters.
    pub fn patch_filters(self, mut patch: impl FnMut(&mut Vec<Value>)) -> Self {
        self.patch_hcm(|hcm| patch(array(&mut hcm["http_filters"])))
    }

    /// Changes the plugin's configuration (`typed_config.config` of the filter).
    pub fn patch_plugin(mut self, mut patch: impl FnMut(&mut Value)) -> Self {
        for listener in array(&mut self.bootstrap["static_resources"]["listeners"]) {
            each_plugin(listener, &mut patch);
        }
        self
    }

    fn configuration(self, any: Value) -> Self {
        self.patch_plugin(|config| config["configuration"] = any.clone())
    }

    /// The bootstrap for one instance that keeps its files in `dir`: ports picked by the kernel, the plugin's path made
    /// absolute, the access log in a file. Returns it with the listeners as a file source delivers them, where wanted.
    pub(crate) fn place(&self, dir: &Path) -> Result<(Value, Option<Value>)> {
        let mut placed = self.clone();
        for listener in array(&mut placed.bootstrap["static_resources"]["listeners"]) {
            free_port(&mut listener["address"]).context("a listener's address")?;
        }
        free_port(&mut placed.bootstrap["admin"]["address"]).context("admin.address")?;
        let mut wasm = Ok(());
        placed = placed.patch_plugin(|config| {
            let file = &mut config["vm_config"]["code"]["local"]["filename"];
            match plugin_file(file.as_str().unwrap_or_default()) {
                Ok(path) => *file = json!(path),
                Err(e) => wasm = Err(e),
            }
        });
        wasm?;
        let access_log = dir.join("access.log");
        let mut placed = placed.patch_hcm(|hcm| log_to_file(&mut hcm["access_log"], &access_log));
        // Envoy merges histograms when it flushes: every 5 s by default, and a test would wait that long to see one.
        let flush = &mut placed.bootstrap["stats_flush_interval"];
        if flush.is_null() {
            *flush = json!("0.2s");
        }
        let listeners = placed.listener_from_file.then(|| placed.deliver_by_file(dir));
        Ok((placed.bootstrap, listeners))
    }

    fn deliver_by_file(&mut self, dir: &Path) -> Value {
        let listeners = self.bootstrap["static_resources"]["listeners"].take();
        self.bootstrap["static_resources"]["listeners"] = json!([]);
        let node = &mut self.bootstrap["node"];
        if node.is_null() {
            *node = json!({ "id": "testkit", "cluster": "testkit" });
        }
        self.bootstrap["dynamic_resources"]["lds_config"] = json!({
            "resource_api_version": "V3",
            "path_config_source": { "path": dir.join(LDS_FILE) },
        });
        listeners
    }
}

/// The file that delivers listeners, in an instance's directory.
pub(crate) const LDS_FILE: &str = "lds.json";

/// What a file source delivers: `listeners` as a discovery response.
pub(crate) fn discovery_response(listeners: &Value, version: u64) -> Value {
    let listeners = listeners.as_array().cloned().unwrap_or_default();
    let typed = |mut listener: Value| {
        listener["@type"] = json!("type.googleapis.com/envoy.config.listener.v3.Listener");
        listener
    };
    json!({ "version_info": version.to_string(), "resources": listeners.into_iter().map(typed).collect::<Vec<_>>() })
}

/// A text as a plugin's configuration.
pub(crate) fn string_value(text: &str) -> Value {
    json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": text })
}

/// Calls `patch` with the `typed_config.config` of every filter of ours in `listener`.
pub(crate) fn each_plugin(listener: &mut Value, patch: &mut impl FnMut(&mut Value)) {
    each_hcm(listener, &mut |hcm| {
        // A filter whose configuration comes by itself has none here.
        let ours = |filter: &&mut Value| filter["name"] == FILTER && filter.get("typed_config").is_some();
        for filter in array(&mut hcm["http_filters"]).iter_mut().filter(ours) {
            patch(&mut filter["typed_config"]["config"]);
        }
    });
}

fn each_hcm(listener: &mut Value, patch: &mut impl FnMut(&mut Value)) {
    for chain in array(&mut listener["filter_chains"]) {
        for filter in array(&mut chain["filters"]).iter_mut().filter(|f| f["name"] == HCM) {
            patch(&mut filter["typed_config"]);
        }
    }
}

/// The plugin's file as an absolute path: the shipped configurations name it from the repository's root.
fn plugin_file(named: &str) -> Result<PathBuf> {
    if named == "dist/interlock.wasm" {
        return tools::plugin_wasm();
    }
    let path = tools::root().join(named);
    if !path.is_file() {
        bail!("the plugin is not at {}", path.display());
    }
    Ok(path)
}

fn log_to_file(loggers: &mut Value, path: &Path) {
    for logger in loggers.as_array_mut().into_iter().flatten() {
        if logger["name"] == "envoy.access_loggers.stdout" {
            logger["name"] = json!("envoy.access_loggers.file");
            let config = &mut logger["typed_config"];
            config["@type"] = json!("type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog");
            config["path"] = json!(path);
        }
    }
}

fn free_port(address: &mut Value) -> Result<()> {
    let socket = address.get_mut("socket_address").context("is not a socket_address")?;
    socket["address"] = json!("127.0.0.1");
    socket["port_value"] = json!(0);
    Ok(())
}

fn socket_address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } })
}

/// The list at this place of a bootstrap; an absent one is made, so that a patch can fill it.
fn array(value: &mut Value) -> &mut Vec<Value> {
    if value.is_null() {
        *value = json!([]);
    }
    value.as_array_mut().expect("a bootstrap has a list here")
}

/// A route to put into the table; to the cluster `upstream` unless it says otherwise.
#[derive(Debug, Clone)]
pub struct Route(Value);

impl Route {
    /// Takes paths that begin with `prefix`.
    pub fn prefix(prefix: &str) -> Self {
        Self(json!({ "match": { "prefix": prefix }, "route": { "cluster": UPSTREAM } }))
    }

    /// Takes this one path.
    pub fn path(path: &str) -> Self {
        Self(json!({ "match": { "path": path }, "route": { "cluster": UPSTREAM } }))
    }

    /// Its name: `xds.route_name`.
    pub fn named(self, name: &str) -> Self {
        self.patch(|route| route["name"] = json!(name))
    }

    /// The cluster it goes to.
    pub fn cluster(self, name: &str) -> Self {
        self.patch(|route| route["route"]["cluster"] = json!(name))
    }

    /// How long the upstream may take, as Envoy writes it: `1.5s`.
    pub fn timeout(self, timeout: &str) -> Self {
        self.patch(|route| route["route"]["timeout"] = json!(timeout))
    }

    /// The metadata `filter_metadata["interlock"]`.
    pub fn metadata(self, metadata: Value) -> Self {
        self.patch(|route| route["metadata"]["filter_metadata"][FILTER] = metadata)
    }

    /// Runs the filter here although it is `disabled: true` in the list.
    pub fn enabled(self) -> Self {
        self.per_filter(
            FILTER,
            json!({ "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {} }),
        )
    }

    /// One filter's configuration for this route.
    pub fn per_filter(self, filter: &str, config: Value) -> Self {
        self.patch(|route| route["typed_per_filter_config"][filter] = config)
    }

    /// Changes anything.
    pub fn patch(mut self, patch: impl FnOnce(&mut Value)) -> Self {
        patch(&mut self.0);
        self
    }
}
