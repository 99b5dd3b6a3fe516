//! What the documentation quotes: policies, and the rows of its tables of errors.

use std::path::Path;

use serde_json::Value;

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// YAML as JSON.
pub fn yaml(text: &str) -> Option<Value> {
    let mut value: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).ok()?;
    value.apply_merge().ok()?;
    serde_json::to_value(value).ok()
}

/// Every YAML and JSON block of the pages with policies, with the page's name.
pub fn policies() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for page in ["docs/policy.md", "README.md", "examples/bank/README.md"] {
        let text = read(page);
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(info) = line.strip_prefix("```") {
                let body: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with("```")).collect();
                if matches!(info.trim(), "yaml" | "json") {
                    found.extend(yaml(&body.join("\n")).map(|policy| (page.to_owned(), policy)));
                }
            }
        }
    }
    let bootstrap = yaml(&read("envoy/local.yaml")).expect("the bootstrap is YAML");
    structs(&bootstrap, &mut found);
    found
}

fn structs(value: &Value, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(fields) => {
            if fields.get("@type").is_some_and(|kind| kind == "type.googleapis.com/google.protobuf.Struct") {
                found.extend(fields.get("value").map(|policy| ("envoy/local.yaml".to_owned(), policy.clone())));
            }
            fields.values().for_each(|value| structs(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| structs(value, found)),
        _ => {}
    }
}

/// The bodies of the calls on the page of the lease API.
pub fn bodies() -> Vec<String> {
    let page = read("docs/api.md");
    page.split("-d '").skip(1).filter_map(|rest| Some(rest.split_once('\'')?.0.to_owned())).collect()
}

/// The first cells of the table of `docs/policy.md` with this header line.
pub fn cells(header: &str) -> Vec<String> {
    let page = read("docs/policy.md");
    let body = page.split_once(&format!("{header}\n")).unwrap_or_else(|| panic!("no table {header}")).1;
    let first = |line: &str| {
        let cell = line.trim_matches('|').split(" | ").next().unwrap_or_default().trim().to_owned();
        let code = cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`')).map(str::to_owned);
        code.unwrap_or(cell)
    };
    body.lines().skip(1).take_while(|line| line.starts_with('|')).map(first).collect()
}
