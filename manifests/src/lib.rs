//! The manifests of `envoy/istio`, read and checked as strictly as can be done without a cluster: Kubernetes' own kinds by their
//! types, Istio's by the schemas of its CRDs. Everywhere a field that is not known is an error.
//!
//! Must not live here: what the plugin makes of a policy. The tests ask the plugin.

use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::{Draft, Validator};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// The CRDs whose kinds are in the manifests; see `crds/README.md`.
const CRDS: [&str; 6] = [
    include_str!("../crds/AuthorizationPolicy.json"),
    include_str!("../crds/DestinationRule.json"),
    include_str!("../crds/EnvoyFilter.json"),
    include_str!("../crds/PeerAuthentication.json"),
    include_str!("../crds/PrometheusRule.json"),
    include_str!("../crds/WasmPlugin.json"),
];

/// One document of a file.
#[derive(Clone, Debug)]
pub struct Document {
    /// The file's name.
    pub file: String,
    /// The document.
    pub value: Value,
}

/// Where the manifests are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy/istio")
}

/// The documents of a file of YAML.
///
/// # Errors
/// Why it cannot be read.
pub fn documents(path: &Path) -> Result<Vec<Document>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| failed(&error))?;
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let document = |document| {
        let value = Value::deserialize(document).map_err(|error| failed(&error))?;
        Ok(Document { file: file.clone(), value })
    };
    let documents: Result<Vec<_>, String> = serde_yaml_ng::Deserializer::from_str(&text).map(document).collect();
    // Between two separators there may be a comment, and nothing else.
    documents.map(|documents| documents.into_iter().filter(|document| !document.value.is_null()).collect())
}

/// All documents of all files that ship, file by file.
///
/// # Errors
/// The file that cannot be read, and why.
pub fn shipped() -> Result<Vec<Document>, String> {
    let entries = fs::read_dir(folder()).map_err(|error| format!("{}: {error}", folder().display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let all: Result<Vec<_>, String> = files.iter().map(|path| documents(path)).collect();
    Ok(all?.into_iter().flatten().collect())
}

/// Checks one document: its kind is known, every field of it is, and every value is one that the field can have.
///
/// # Errors
/// The first place that is wrong, and how.
pub fn check(document: &Value) -> Result<(), String> {
    let text = |field: &str| document[field].as_str().unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        ("v1", "ConfigMap") => typed::<ConfigMap>(document),
        ("v1", "Service") => typed::<Service>(document),
        ("v1", "ServiceAccount") => typed::<ServiceAccount>(document),
        ("apps/v1", "Deployment") => typed::<Deployment>(document),
        (version, kind) => custom(version, kind, document),
    }
}

/// Checks a value by a Kubernetes type. What the type does not know it loses, and so it is found.
fn typed<T: DeserializeOwned + Serialize>(value: &Value) -> Result<(), String> {
    let typed = T::deserialize(value).map_err(|error| error.to_string())?;
    let again = serde_json::to_value(typed).map_err(|error| error.to_string())?;
    same(value, &again, "")
}

fn same(written: &Value, understood: &Value, place: &str) -> Result<(), String> {
    match (written, understood) {
        (Value::Object(written), Value::Object(understood)) => written.iter().try_for_each(|(field, value)| {
            let place = format!("{place}/{field}");
            let understood = understood.get(field).ok_or_else(|| format!("{place}: there is no such field"))?;
            same(value, understood, &place)
        }),
        (Value::Array(written), Value::Array(understood)) if written.len() == understood.len() => {
            let mut pairs = written.iter().zip(understood).enumerate();
            pairs.try_for_each(|(index, (value, understood))| same(value, understood, &format!("{place}/{index}")))
        }
        _ if written == understood => Ok(()),
        _ => Err(format!("{place}: {written} is understood as {understood}")),
    }
}

fn custom(version: &str, kind: &str, document: &Value) -> Result<(), String> {
    let crds = CRDS.iter().filter_map(|crd| serde_json::from_str::<Value>(crd).ok());
    let crd = crds.into_iter().find(|crd| crd["kind"] == kind && crd["apiVersion"] == version);
    let crd = crd.ok_or_else(|| format!("the kind {kind} of {version} is not known here"))?;
    let known = ["apiVersion", "kind", "metadata", "spec"];
    let fields = document.as_object().map(Map::keys).into_iter().flatten();
    if let Some(unknown) = fields.into_iter().find(|field| !known.contains(&field.as_str())) {
        return Err(format!("/{unknown}: there is no such field"));
    }
    typed::<ObjectMeta>(&document["metadata"]).map_err(|error| format!("/metadata{error}"))?;
    let schema = closed(&crd["schema"]["properties"]["spec"]);
    let error = |error: &dyn std::fmt::Display, place: &dyn std::fmt::Display| format!("/spec{place}: {error}");
    let validator: Validator =
        jsonschema::options().with_draft(Draft::Draft4).build(&schema).map_err(|e| error(&e, &""))?;
    match validator.iter_errors(&document["spec"]).next() {
        Some(found) => Err(error(&found, &found.instance_path())),
        None => Ok(()),
    }
}

/// A schema of a CRD that takes no field that it does not name. A cluster would drop those without a word, or with a warning.
fn closed(schema: &Value) -> Value {
    let Some(fields) = schema.as_object() else { return schema.clone() };
    let mut out = fields.clone();
    for name in ["properties"] {
        if let Some(Value::Object(inner)) = out.get_mut(name) {
            inner.values_mut().for_each(|schema| *schema = closed(schema));
        }
    }
    for name in ["items", "additionalProperties"] {
        if let Some(inner) = out.get_mut(name) {
            *inner = closed(inner);
        }
    }
    let open = fields.get("x-kubernetes-preserve-unknown-fields") == Some(&json!(true));
    if fields.contains_key("properties") && !open && !fields.contains_key("additionalProperties") {
        out.insert("additionalProperties".into(), json!(false));
    }
    Value::Object(out)
}

/// The files in a ConfigMap that are YAML or JSON, by their names.
///
/// # Errors
/// The file that is neither.
pub fn files(config_map: &Value) -> Result<Vec<(String, Value)>, String> {
    let data = config_map["data"].as_object().map(|data| data.iter()).into_iter().flatten();
    let read = |(name, text): (&String, &Value)| {
        let text = text.as_str().ok_or_else(|| format!("{name}: is no text"))?;
        let value = serde_yaml_ng::from_str(text).map_err(|error| format!("{name}: {error}"))?;
        Ok((name.clone(), value))
    };
    data.map(read).collect()
}

/// Every policy in a document: a WasmPlugin's `pluginConfig`, and wherever Envoy is given a Struct, in the files of a ConfigMap
/// too.
///
/// # Errors
/// A file of a ConfigMap that cannot be read.
pub fn policies(document: &Value) -> Result<Vec<Value>, String> {
    let mut found = Vec::new();
    match document["kind"].as_str() {
        Some("WasmPlugin") => found.push(document["spec"]["pluginConfig"].clone()),
        Some("ConfigMap") => files(document)?.iter().for_each(|(_, file)| structs(file, &mut found)),
        _ => structs(document, &mut found),
    }
    Ok(found)
}

fn structs(value: &Value, found: &mut Vec<Value>) {
    match value {
        Value::Object(fields) => {
            if fields.get("@type").is_some_and(|kind| kind == "type.googleapis.com/google.protobuf.Struct") {
                found.extend(fields.get("value").cloned());
            }
            fields.values().for_each(|value| structs(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| structs(value, found)),
        _ => {}
    }
}
