//! What envoy/istio gives to a cluster: typed, understood by the plugin, and of one mind with what else is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use interlock::policy::{Enforcement, Policy};
use interlock_manifests::{Document, check, files, folder, policies, shipped};
use serde_json::{Value, json};

fn all() -> Vec<Document> {
    shipped().unwrap()
}

fn parse(policy: &Value) -> Result<Policy, String> {
    let known = ["INTERLOCK_KEY", "INTERLOCK_TOKEN"];
    let env = |name: &str| known.contains(&name).then(|| "0123456789abcdef0123456789abcdef".to_owned());
    Policy::parse(policy.to_string().as_bytes(), &env).map_err(|error| error.to_string())
}

/// The files with a sidecar's policy.
const SIDECARS: [&str; 4] = ["audit.yaml", "enforce.yaml", "filter.yaml", "guard.yaml"];

/// The document of that kind and name in that file.
fn find(file: &str, kind: &str, name: &str) -> Value {
    let is_it = |document: &Document| {
        document.file == file && document.value["kind"] == kind && document.value["metadata"]["name"] == name
    };
    all().into_iter().find(is_it).unwrap_or_else(|| panic!("{file}: no {kind} {name}")).value
}

/// The only policy of that file, as it is written.
fn policy_of(file: &str) -> Value {
    let documents = all().into_iter().filter(|document| document.file == file);
    let mut found: Vec<Value> = documents.flat_map(|document| policies(&document.value).unwrap()).collect();
    assert_eq!(found.len(), 1, "{file}");
    found.remove(0)
}

#[test]
fn every_document_is_one_that_its_kind_takes() {
    let documents = all();
    for Document { file, value } in &documents {
        check(value).unwrap_or_else(|error| panic!("{file}, {}: {error}", value["kind"]));
    }
    let kinds: BTreeSet<&str> = documents.iter().filter_map(|document| document.value["kind"].as_str()).collect();
    assert_eq!(kinds.len(), 10, "{kinds:?}");
}

/// Fields below which any name will do.
const FREE: [&str; 8] = ["annotations", "data", "labels", "limits", "matchLabels", "pluginConfig", "requests", "value"];

/// The JSON pointers of all fields that a schema knows.
fn fields(value: &Value, place: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(inner) => {
            for (name, value) in inner {
                let place = format!("{place}/{}", name.replace('~', "~0").replace('/', "~1"));
                // A Service's selector is labels; others have fields.
                let is_labels = name == "selector" && value.get("app").is_some();
                if !FREE.contains(&name.as_str()) && !is_labels {
                    fields(value, &place, found);
                }
                found.push(place);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                fields(item, &format!("{place}/{index}"), found);
            }
        }
        _ => {}
    }
}

/// Any field of any document, with one letter more.
#[test]
fn no_misspelt_field_gets_through() {
    let mut tried = 0;
    for Document { file, value } in all() {
        let mut places = Vec::new();
        fields(&value, "", &mut places);
        for place in places {
            let (parent, name) = place.rsplit_once('/').unwrap();
            let mut misspelt = value.clone();
            let object = misspelt.pointer_mut(parent).unwrap().as_object_mut().unwrap();
            let content = object.remove(name).unwrap();
            object.insert(format!("{name}x"), content);
            assert!(check(&misspelt).is_err(), "{file}: {place}x is taken");
            tried += 1;
        }
    }
    assert!(tried > 250, "{tried}");
}

#[test]
fn no_value_gets_through_that_its_field_cannot_have() {
    for (file, kind, name, place, wrong) in [
        ("audit.yaml", "WasmPlugin", "interlock-audit", "/spec/failStrategy", json!("FAIL_OPENED")),
        ("audit.yaml", "WasmPlugin", "interlock-audit", "/spec/phase", json!("STAT")),
        ("audit.yaml", "WasmPlugin", "interlock-audit", "/spec/priority", json!("high")),
        ("audit.yaml", "WasmPlugin", "interlock-audit", "/spec/match/0/mode", json!("SERVERS")),
        ("audit.yaml", "WasmPlugin", "interlock-audit", "/spec/pluginConfig", json!("enforcement: audit")),
        (
            "enforce.yaml",
            "EnvoyFilter",
            "without-interlock-audit",
            "/spec/configPatches/0/applyTo",
            json!("HTTPFILTER"),
        ),
        (
            "enforce.yaml",
            "EnvoyFilter",
            "without-interlock-audit",
            "/spec/configPatches/0/patch/operation",
            json!("DROP"),
        ),
        ("authority.yaml", "PeerAuthentication", "interlock-authority", "/spec/mtls/mode", json!("STRCIT")),
        ("authority.yaml", "AuthorizationPolicy", "interlock-authority", "/spec/action", json!("PERMIT")),
        ("authority.yaml", "DestinationRule", "interlock-authority", "/spec/trafficPolicy/tls/mode", json!("MTLS")),
        ("authority.yaml", "Deployment", "interlock-authority", "/spec/replicas", json!("one")),
        ("authority.yaml", "Service", "interlock-authority", "/spec/publishNotReadyAddresses", json!("yes")),
    ] {
        let mut document = find(file, kind, name);
        assert_eq!(check(&document), Ok(()), "{file}");
        *document.pointer_mut(place).unwrap_or_else(|| panic!("{file}: no {place}")) = wrong;
        assert!(check(&document).is_err(), "{file}: {place} takes {}", document.pointer(place).unwrap());
    }
}

#[test]
fn the_plugin_takes_every_policy() {
    let mut seen = BTreeMap::new();
    for Document { file, value } in all() {
        for policy in policies(&value).unwrap() {
            let parsed = parse(&policy).unwrap_or_else(|error| panic!("{file}: {error}"));
            seen.insert(file.clone(), parsed.enforcement);
            // What would be overlooked if they were taken for something else than policies.
            let mut misspelt = policy.clone();
            misspelt["enforcment"] = json!("audit");
            let line = r#"enforcment: there is no such field; did you mean "enforcement"?"#;
            assert_eq!(parse(&misspelt).map(|_| ()), Err(line.to_owned()), "{file}");
        }
    }
    assert_eq!(seen["audit.yaml"], Enforcement::Audit);
    assert!(matches!(seen["enforce.yaml"], Enforcement::Partly(_)));
    assert_eq!(seen["gateway.yaml"], Enforcement::Off);
    assert_eq!(seen["authority.yaml"], Enforcement::Enforce);
    assert_eq!(seen["filter.yaml"], Enforcement::Enforce);
    assert_eq!(seen["guard.yaml"], Enforcement::Audit);
    assert_eq!(seen.len(), 6);
}

/// Kubernetes reads YAML 1.1, where `off` is false.
#[test]
fn no_word_is_taken_for_a_boolean() {
    let words = ["on", "off", "yes", "no", "y", "n"];
    for entry in fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        for line in fs::read_to_string(&path).unwrap().lines() {
            let code = line.split(" #").next().unwrap();
            let values = code.split([',', '[', ']', '{', '}']).filter_map(|part| part.split_once(": "));
            for (_, value) in values.filter(|_| !code.trim_start().starts_with('#')) {
                assert!(!words.contains(&value.trim().to_ascii_lowercase().as_str()), "{}: {line}", path.display());
            }
        }
    }
}

/// Classes that the authority knows, and limits that fit into its own.
#[test]
fn the_policies_of_one_mesh_agree() {
    let authority = policy_of("authority.yaml");
    let names = |policy: &Value| {
        let classes = policy["classes"].as_array().unwrap().iter();
        classes.map(|class| class["name"].to_string()).collect::<BTreeSet<_>>()
    };
    let mut instances = BTreeSet::new();
    for file in SIDECARS {
        let policy = policy_of(file);
        assert!(instances.insert(policy["instance"].to_string()), "{file}: lock-status would not say whose it is");
        assert!(names(&policy).is_subset(&names(&authority)), "{file}");
        let (sidecar, authority) = (parse(&policy).unwrap(), parse(&authority).unwrap());
        assert!(sidecar.limits.max_wait <= authority.limits.max_wait, "{file}");
        assert!(sidecar.limits.max_ttl <= authority.limits.max_ttl, "{file}");
    }
}

/// What is written in one place and meant in another.
#[test]
fn names_lead_to_what_they_name() {
    let [service, deployment, rule, access] = ["Service", "Deployment", "DestinationRule", "AuthorizationPolicy"]
        .map(|kind| find("authority.yaml", kind, "interlock-authority"));
    let config = find("authority.yaml", "ConfigMap", "interlock-authority");
    let [(_, bootstrap)] = &files(&config).unwrap()[..] else { panic!("one file") };
    let policy = policy_of("authority.yaml");
    let prefix = policy["api"]["prefix"].as_str().unwrap();

    let metadata = &service["metadata"];
    let host =
        format!("{}.{}.svc.cluster.local", metadata["name"].as_str().unwrap(), metadata["namespace"].as_str().unwrap());
    assert_eq!(rule["spec"]["host"], host.as_str());
    let keepalive = find("authority.yaml", "EnvoyFilter", "interlock-authority-keepalive");
    let cluster = &keepalive["spec"]["configPatches"][0]["match"]["cluster"];
    assert_eq!(*cluster, json!({ "service": host, "portNumber": service["spec"]["ports"][0]["port"] }));
    let port = service["spec"]["ports"][0]["port"].as_u64().unwrap();
    for file in SIDECARS {
        let backend = &policy_of(file)["backend"]["authority"];
        assert_eq!(backend["cluster"], format!("outbound|{port}||{host}"), "{file}");
        assert_eq!(backend["prefix"], prefix, "{file}");
    }

    let pod = &deployment["spec"]["template"];
    let labels = &pod["metadata"]["labels"];
    for selector in [
        &service["spec"]["selector"],
        &deployment["spec"]["selector"]["matchLabels"],
        &access["spec"]["selector"]["matchLabels"],
    ] {
        for (name, value) in selector.as_object().unwrap() {
            assert_eq!(labels[name], *value, "{name}");
        }
    }
    let envoy = &pod["spec"]["containers"][0];
    let listening: Vec<&Value> = bootstrap["static_resources"]["listeners"]
        .as_array()
        .unwrap()
        .iter()
        .map(|listener| &listener["address"]["socket_address"]["port_value"])
        .collect();
    let of =
        |list: &Value, field: &str| list.as_array().unwrap().iter().map(|port| port[field].clone()).collect::<Vec<_>>();
    assert_eq!(of(&envoy["ports"], "containerPort").iter().collect::<Vec<_>>(), listening);
    assert_eq!(of(&service["spec"]["ports"], "targetPort").iter().collect::<Vec<_>>(), listening);
    assert_eq!(envoy["readinessProbe"]["httpGet"], json!({ "path": format!("{prefix}/health"), "port": listening[0] }));
    assert_eq!(envoy["livenessProbe"]["httpGet"]["port"], *listening[1]);

    let filter = &bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        [0];
    let vm = &filter["typed_config"]["config"]["vm_config"];
    assert_eq!(Value::from(of(&envoy["env"], "name")), vm["environment_variables"]["host_env_keys"]);
    let mount = |name: &str| {
        let mounts = envoy["volumeMounts"].as_array().unwrap();
        mounts.iter().find(|mount| mount["name"] == name).unwrap()["mountPath"].as_str().unwrap()
    };
    // plugin.wasm is what `cargo xtask oci` packs.
    assert_eq!(vm["code"]["local"]["filename"], format!("{}/plugin.wasm", mount("plugin")));
    assert_eq!(envoy["args"][1], format!("{}/envoy.yaml", mount("bootstrap")));

    let said = access.to_string();
    let paths = said.split('"').filter(|text| text.starts_with("/interlock/"));
    assert!(paths.filter(|path| path.starts_with(&format!("{prefix}/"))).count() >= 6);
}

/// The filter that a namespace takes out is the one that the mesh-wide plugin becomes.
#[test]
fn the_namespace_takes_out_what_the_mesh_put_in() {
    let audit = find("audit.yaml", "WasmPlugin", "interlock-audit");
    let of = |field: &str| audit["metadata"][field].as_str().unwrap();
    let resource = format!("{}.{}", of("namespace"), of("name"));
    for file in ["enforce.yaml", "guard.yaml"] {
        let filter = find(file, "EnvoyFilter", "without-interlock-audit");
        let plugin = all().into_iter().find(|other| other.file == file && other.value["kind"] == "WasmPlugin");
        let plugin = plugin.unwrap().value;
        assert_eq!(filter["metadata"]["namespace"], plugin["metadata"]["namespace"], "{file}");
        let workloads = ["/spec/workloadSelector/labels", "/spec/selector/matchLabels"];
        assert_eq!(filter.pointer(workloads[0]), plugin.pointer(workloads[1]), "{file}");
        let patches = filter["spec"]["configPatches"].as_array().unwrap();
        let removed: Vec<Value> = patches
            .iter()
            .map(|patch| {
                assert_eq!(patch["patch"], json!({ "operation": "REMOVE" }));
                patch["match"]["listener"]["filterChain"]["filter"]["subFilter"]["name"].clone()
            })
            .collect();
        // pilot/pkg/model/extensions.go: WasmPluginResourceNamePrefix up to 1.29; since then TrafficExtensionResourceNamePrefix,
        // with the marker of pilot/pkg/config/kube/extensions/translate.go behind the name.
        assert_eq!(
            removed,
            [
                json!(format!("extensions.istio.io/wasmplugin/{resource}")),
                json!(format!("extensions.istio.io/trafficextension/{resource}~istio-translated-wasmplugin")),
            ],
            "{file}"
        );
    }
}

/// What a guard needs beside its policy: the key where the policy looks for it, and who signs by the same name.
#[test]
fn the_guard_has_its_key() {
    let plugin = find("guard.yaml", "WasmPlugin", "interlock-guard");
    let policy = &plugin["spec"]["pluginConfig"];
    let keys: Vec<&Value> = policy["keys"].as_array().unwrap().iter().map(|key| &key["secret"]["env"]).collect();
    let given: Vec<&Value> =
        plugin["spec"]["vmConfig"]["env"].as_array().unwrap().iter().map(|env| &env["name"]).collect();
    assert_eq!(keys, given);
    let checks: BTreeSet<String> =
        policy["guard"].as_array().unwrap().iter().map(|guard| guard["check"].to_string()).collect();
    assert_eq!(checks.len(), 2, "both checks are shown");
    // Without the variable it is refused, and with the push the old policy stays.
    let error = Policy::parse(policy.to_string().as_bytes(), &|_: &str| None).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("INTERLOCK_KEY"), "{error}");
}

/// The bootstraps that ship differ where they must, and nowhere else.
#[test]
fn the_authority_of_a_mesh_is_the_one_that_ships() {
    let text = fs::read_to_string(folder().join("../authority.yaml")).unwrap();
    let shipped: Value = serde_yaml_ng::from_str(&text).unwrap();
    let config = find("authority.yaml", "ConfigMap", "interlock-authority");
    let [(_, mine)] = &files(&config).unwrap()[..] else { panic!("one file") };
    let filter = |bootstrap: &Value| {
        let manager = &bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"];
        let mut filter = manager["http_filters"][0].clone();
        let config = &mut filter["typed_config"]["config"];
        config["vm_config"]["code"].take();
        let policy = config["configuration"]["value"].take();
        (filter, policy, manager["stream_idle_timeout"].clone(), manager["route_config"].clone())
    };
    let (of_mine, of_shipped) = (filter(mine), filter(&shipped));
    assert_eq!((&of_mine.0, &of_mine.2, &of_mine.3), (&of_shipped.0, &of_shipped.2, &of_shipped.3));
    for field in ["api", "keys", "defaults", "limits"] {
        assert_eq!(of_mine.1[field], of_shipped.1[field], "{field}");
    }
    assert_eq!(mine["stats_config"], shipped["stats_config"]);
    let stats = find("stats.yaml", "ConfigMap", "interlock-stats");
    let [(name, stats)] = &files(&stats).unwrap()[..] else { panic!("one file") };
    assert_eq!(name, "custom_bootstrap.json", "what Istio's injector names");
    assert_eq!(*stats, json!({ "stats_config": shipped["stats_config"] }));
}

#[test]
fn the_readme_names_every_file() {
    let readme = fs::read_to_string(folder().join("README.md")).unwrap();
    for Document { file, .. } in all() {
        assert!(readme.contains(&format!("[{file}]({file})")), "{file}");
    }
}

/// `cargo xtask manifests FILE…`.
#[test]
fn files_are_checked_before_a_cluster_gets_them() {
    let check = |files: &[std::path::PathBuf]| {
        let checked = Command::new(env!("CARGO_BIN_EXE_interlock-manifests")).args(files).output().unwrap();
        (checked.status.code().unwrap(), String::from_utf8(checked.stderr).unwrap())
    };
    let right = ["audit.yaml", "gateway.yaml"].map(|file| folder().join(file));
    assert_eq!(check(&right), (0, String::new()));
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(&right[0]).unwrap();
    let wrong = |name: &str, from: &str, to: &str| {
        let path = dir.path().join(name);
        assert!(text.contains(from));
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        check(&[right[1].clone(), path])
    };
    let (code, said) = wrong("policy.yaml", "    rules:", "    ruels:");
    let line = "policy.yaml: WasmPlugin interlock-audit: the policy is refused: ruels: there is no such field; did you mean \"rules\"?\n";
    assert_eq!((code, said.as_str()), (1, line));
    let (code, said) = wrong("field.yaml", "failStrategy", "failstrategy");
    assert_eq!(code, 1);
    assert!(
        said.starts_with("field.yaml: WasmPlugin interlock-audit: /spec: ") && said.contains("failstrategy"),
        "{said}"
    );
    assert_eq!(check(&[dir.path().join("none.yaml")]).0, 1);
}
