//! What the documentation shows is what the plugin reads and says: policies parse, quoted errors are the real ones, and
//! the tables of refusals and outcomes agree with the code.
//!
//! A fenced block marked `yaml` or `json` is a policy. `yaml envoy` is a fragment of an Envoy configuration and
//! `json example` an answer or a log line: those only have to be well-formed.

// Tests may panic: that is how they fail. The plugin may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::string_slice)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use interlock::annotation;
use interlock::answer::headers::{Outcome, lock_fence, lock_status, parse_lock_fence};
use interlock::answer::{Reject, Shown};
use interlock::policy::Policy;
use interlock_core::{Cause, Fence, Limit, LockName, Loss, Mode, OwnerId, Refusal};
use serde_json::Value;

/// The pages with policies in them.
const PAGES: [&str; 9] = [
    "docs/policy.md",
    "docs/api.md",
    "docs/authority.md",
    "docs/etcd.md",
    "docs/guard.md",
    "docs/rollout.md",
    "README.md",
    "examples/bank/README.md",
    "examples/mesh/README.md",
];

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(text: &str) -> Value {
    let mut value: serde_yaml_ng::Value =
        serde_yaml_ng::from_str(text).unwrap_or_else(|error| panic!("not YAML, {error}:\n{text}"));
    value.apply_merge().unwrap();
    serde_json::to_value(value).unwrap()
}

fn parse(policy: &Value) -> Result<Policy, String> {
    let known = ["INTERLOCK_KEY", "INTERLOCK_TOKEN"];
    let env = |name: &str| known.contains(&name).then(|| "0123456789abcdef0123456789abcdef".to_owned());
    Policy::parse(policy.to_string().as_bytes(), &env).map_err(|error| error.to_string())
}

/// The fenced blocks of a page: what stands behind the fence, and the block.
fn blocks(page: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(info) = line.strip_prefix("```") {
            let body: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with("```")).collect();
            blocks.push((info.trim().to_owned(), body.join("\n")));
        }
    }
    blocks
}

/// The rows of the table with this header line, cell by cell, without the backticks of a cell that is all code.
fn rows(page: &str, header: &str) -> Vec<Vec<String>> {
    let body = page.split_once(&format!("{header}\n")).unwrap_or_else(|| panic!("no table {header}")).1;
    let cell = |cell: &str| {
        let cell = cell.trim();
        let code = cell.strip_prefix('`').and_then(|cell| cell.strip_suffix('`'));
        code.filter(|code| !code.contains('`')).unwrap_or(cell).to_owned()
    };
    let row = |line: &str| line.trim_matches('|').split(" | ").map(cell).collect();
    let rows: Vec<Vec<String>> = body.lines().skip(1).take_while(|line| line.starts_with('|')).map(row).collect();
    assert!(rows.len() > 2, "the table {header} has no rows");
    rows
}

#[test]
fn every_policy_of_the_bootstraps_parses() {
    let mesh = ["authority", "orders", "payments", "shipping", "stock"].map(|name| format!("envoy/mesh/{name}.yaml"));
    let alone = ["local", "authority", "sidecar", "etcd/sidecar"].map(|name| format!("envoy/{name}.yaml"));
    for file in alone.iter().chain(&mesh) {
        let bootstrap = yaml(&read(file));
        let filters = &bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0];
        let ours = &filters["typed_config"]["http_filters"][0]["typed_config"]["config"]["configuration"]["value"];
        assert!(ours.is_object(), "{file}");
        parse(ours).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

#[test]
fn every_policy_of_the_documentation_parses() {
    for page in PAGES {
        let mut policies = 0;
        for (info, text) in blocks(&read(page)) {
            match info.as_str() {
                "yaml" | "json" => {
                    parse(&yaml(&text)).unwrap_or_else(|error| panic!("{page}: {error}\n{text}"));
                    policies += 1;
                }
                "yaml envoy" => drop(yaml(&text)),
                "json example" => drop(serde_json::from_str::<Value>(&text).unwrap()),
                "" | "text" => {}
                other => panic!("{page}: a block of the kind {other:?}, which nothing checks"),
            }
        }
        assert!(policies > 0, "{page} has no policy");
    }
}

#[test]
fn the_policy_of_the_bootstrap_parses() {
    /// Every policy in a bootstrap: a Struct that configures a plugin.
    fn policies<'v>(value: &'v Value, found: &mut Vec<&'v Value>) {
        match value {
            Value::Object(fields) => {
                if fields.get("@type").is_some_and(|kind| kind == "type.googleapis.com/google.protobuf.Struct") {
                    found.extend(fields.get("value"));
                }
                fields.values().for_each(|value| policies(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| policies(value, found)),
            _ => {}
        }
    }
    let bootstrap = yaml(&read("envoy/local.yaml"));
    let mut found = Vec::new();
    policies(&bootstrap, &mut found);
    assert_eq!(found.len(), 1);
    parse(found[0]).unwrap();
}

#[test]
fn the_default_policy_is_the_one_that_is_written_out() {
    let page = read("docs/policy.md");
    let (_, written) = blocks(&page).into_iter().find(|(info, _)| info == "yaml").unwrap();
    let fields =
        ["annotations", "backend", "classes", "defaults", "enforcement", "guard", "instance", "keys", "limits"];
    let fields = [&fields[..], &["on_backend_unavailable", "owner", "reentrancy", "rules"]].concat();
    let written = yaml(&written);
    assert_eq!(written.as_object().unwrap().keys().collect::<Vec<_>>(), fields);
    assert_eq!(written["limits"].as_object().unwrap().len(), 7);
    assert_eq!(written["defaults"].as_object().unwrap().len(), 4);
    let default = parse(&serde_json::json!({ "rules": [], "guard": [] })).unwrap();
    assert_eq!(format!("{:?}", parse(&written).unwrap()), format!("{default:?}"));
}

#[test]
fn quoted_errors_are_what_the_parser_says() {
    let page = read("docs/policy.md");
    for row in rows(&page, "| in the policy | line |") {
        assert_eq!(parse(&yaml(&row[0])).unwrap_err(), row[1], "{}", row[0]);
    }
    for row in rows(&page, "| `lock` | detail |") {
        let error = annotation::parse_lock_header([row[0].as_bytes()]).unwrap_err();
        assert_eq!(format!("lock header: {error}"), row[1]);
    }
}

#[test]
fn quoted_headers_are_what_the_filter_reads_and_writes() {
    let blocks = blocks(&read("docs/policy.md"));
    let line = |name: &str| {
        let lines = blocks.iter().flat_map(|(_, text)| text.lines());
        lines.filter_map(|line| line.strip_prefix(name)).next().unwrap().to_owned()
    };
    assert_eq!(annotation::parse_lock_header([line("lock: ").as_bytes()]).unwrap().len(), 2);
    let fences = line("lock-fence: ");
    assert_eq!(lock_fence(&parse_lock_fence([fences.as_bytes()]).unwrap()), Some(fences));

    let lock = &LockName::parse("stock/7").unwrap();
    let lines = [
        Outcome::Acquired { wait: Duration::from_millis(132) },
        Outcome::Refused { reason: "deadlock", lock: Some(lock) },
        Outcome::Lost { lock },
        Outcome::Unlocked,
        Outcome::Audit { reason: None, lock: None, wait: Some(Duration::ZERO) },
        Outcome::Audit { reason: Some("wait-timeout"), lock: Some(lock), wait: None },
    ]
    .map(|outcome| lock_status("orders", &outcome));
    assert!(blocks.iter().any(|(_, text)| *text == lines.join("\n")), "not in the page:\n{}", lines.join("\n"));
}

#[test]
fn the_table_of_refusals_is_that_of_the_code() {
    let lock = LockName::parse("order/1").unwrap();
    let owner = OwnerId::new("a").unwrap();
    let second = Duration::from_secs(1);
    let limit = |limit| Cause::Limit { limit, value: 1 };
    let causes = [
        Cause::Deadlock { cycle: Vec::new() },
        Cause::OrderViolation { held: lock.clone() },
        Cause::LeaseLost { loss: Loss::Expired },
        Cause::Held { holders: Vec::new(), retry_after: second },
        Cause::WaitTimeout { holders: Vec::new(), waited: second, retry_after: second },
        limit(Limit::Waiters),
        limit(Limit::Locks),
        Cause::Backend { detail: String::new() },
    ];
    let core = |cause| Reject::Core(Refusal { lock: lock.clone(), mode: Mode::Exclusive, owner: owner.clone(), cause });
    let mut all: Vec<Reject> = causes.into_iter().map(core).collect();
    all.push(Reject::Malformed { detail: String::new() });
    all.push(Reject::Forbidden { detail: String::new(), lock: None, owner: None });
    all.push(Reject::FenceRequired { lock: lock.clone(), owner: None, shown: Shown::Nothing });
    all.push(Reject::StaleFence { lock: lock.clone(), owner: owner.clone(), fence: Fence(1) });
    all.push(Reject::NotHolder { lock: lock.clone(), owner: owner.clone() });
    let real = all.iter().map(|reject| {
        let codes = (reject.http_status().to_string(), reject.grpc_status().to_string());
        (reject.slug().to_owned(), codes)
    });
    let page = read("docs/policy.md");
    let rows = rows(&page, "| slug | HTTP | gRPC | when | retry |");
    let written = rows.iter().filter(|row| !row[0].is_empty());
    let written = written.map(|row| (row[0].clone(), (row[1].clone(), row[2].clone())));
    assert_eq!(written.collect::<BTreeMap<_, _>>(), real.collect());
    let kind = core(limit(Limit::LocksPerRequest));
    assert_eq!((kind.retry_after_seconds(), kind.retry_after()), (Some(1), None));
}
