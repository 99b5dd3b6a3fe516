//! Every query of the alerts and of the rollout guide: it is PromQL, and it asks for metrics and labels that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use interlock_manifests::{folder, shipped};
use promql_parser::label::{METRIC_NAME, MatchOp, Matcher};
use promql_parser::parser::{Expr, VectorSelector, parse};
use promql_parser::util::{ExprVisitor, walk_expr};

/// Labels of what was scraped, and of histograms' buckets.
const OUTER: [&str; 3] = ["namespace", "pod", "le"];

/// What a page of the docs says: the rows of the table with that header.
fn rows(page: &str, header: &str) -> Vec<Vec<String>> {
    let path = folder().join("../../docs").join(page);
    let text = fs::read_to_string(path).unwrap();
    let mut rows = Vec::new();
    let mut rest = text.as_str();
    while let Some((_, body)) = rest.split_once(&format!("{header}\n")) {
        let lines = body.lines().skip(1).take_while(|line| line.starts_with('|'));
        let cell = |cell: &str| cell.trim().replace("\\|", "|");
        rows.extend(lines.map(|line| line.trim_matches('|').split(" | ").map(cell).collect::<Vec<_>>()));
        rest = body;
    }
    assert!(rows.len() > 4, "{page} has no table {header}");
    rows
}

/// The metrics of docs/policy.md, each with its labels.
fn metrics() -> BTreeMap<String, BTreeSet<String>> {
    let mut metrics = BTreeMap::new();
    for row in rows("policy.md", "| metric | kind | labels | |") {
        let labels: BTreeSet<String> =
            row[2].split(", ").filter(|label| !label.is_empty()).map(str::to_owned).collect();
        for name in row[0].split(", ").map(|name| name.trim_matches('`')) {
            let histogram = ["_bucket", "_count", "_sum"].map(|end| format!("{name}{end}"));
            let names = if row[1] == "histogram" { histogram.to_vec() } else { vec![name.to_owned()] };
            metrics.extend(names.into_iter().map(|name| (name, labels.clone())));
        }
    }
    metrics
}

/// The values that the labels `outcome` and `reason` can have.
fn words() -> BTreeSet<String> {
    let slugs = rows("policy.md", "| slug | HTTP | gRPC | when | retry |");
    let slugs = slugs.iter().map(|row| row[0].trim_matches('`').to_owned());
    let others = ["acquired", "refused", "cancelled", "unlocked", "lost", "hold-limit", "expired", "store"];
    slugs.chain(others.map(str::to_owned)).collect()
}

/// What a query asks for.
#[derive(Default)]
struct Asked {
    metrics: BTreeSet<String>,
    labels: BTreeSet<String>,
    words: BTreeSet<String>,
}

impl Asked {
    fn selector(&mut self, selector: &VectorSelector) {
        self.metrics.extend(selector.name.clone());
        for Matcher { op, name, value } in &selector.matchers.matchers {
            if name == METRIC_NAME {
                continue;
            }
            self.labels.insert(name.clone());
            if ["outcome", "reason"].contains(&name.as_str()) {
                let alternatives = matches!(op, MatchOp::Re(_) | MatchOp::NotRe(_));
                let words = value.split(|c| alternatives && c == '|');
                self.words.extend(words.map(str::to_owned));
            }
        }
    }
}

impl ExprVisitor for Asked {
    type Error = ();

    fn pre_visit(&mut self, expr: &Expr) -> Result<bool, ()> {
        match expr {
            Expr::VectorSelector(selector) => self.selector(selector),
            Expr::MatrixSelector(selector) => self.selector(&selector.vs),
            Expr::Aggregate(aggregate) => {
                let labels = aggregate.modifier.iter().flat_map(|modifier| modifier.labels().labels.iter());
                self.labels.extend(labels.cloned());
            }
            _ => {}
        }
        Ok(true)
    }
}

fn check(query: &str) -> Result<(), String> {
    let expr = parse(query).map_err(|error| error.to_string())?;
    let mut asked = Asked::default();
    walk_expr(&mut asked, &expr).map_err(|()| "no end".to_owned())?;
    let known = metrics();
    let mut labels: BTreeSet<&str> = OUTER.into_iter().collect();
    for name in &asked.metrics {
        let of_metric = known.get(name).ok_or_else(|| format!("there is no metric {name}"))?;
        labels.extend(of_metric.iter().map(String::as_str));
    }
    if let Some(label) = asked.labels.iter().find(|label| !labels.contains(label.as_str())) {
        return Err(format!("{:?} have no label {label}", asked.metrics));
    }
    match asked.words.difference(&words()).next() {
        Some(word) => Err(format!("no outcome or reason is called {word}")),
        None => Ok(()),
    }
}

#[test]
fn every_query_asks_for_what_there_is() {
    let mut queries = Vec::new();
    for document in shipped().unwrap().iter().filter(|document| document.value["kind"] == "PrometheusRule") {
        for group in document.value["spec"]["groups"].as_array().unwrap() {
            let rules = group["rules"].as_array().unwrap().iter();
            queries.extend(rules.map(|rule| rule["expr"].as_str().unwrap().to_owned()));
        }
    }
    let alerts = queries.len();
    for header in ["| question | PromQL | go on when |", "| question | PromQL |"] {
        let cells = rows("rollout.md", header).into_iter().map(|row| row[1].clone());
        // Words may stand behind the query.
        queries.extend(cells.map(|cell| cell.split('`').nth(1).unwrap().to_owned()));
    }
    assert!(alerts >= 9 && queries.len() >= alerts + 14, "{alerts} of {}", queries.len());
    for query in queries {
        check(&query).unwrap_or_else(|error| panic!("{error}: {query}"));
    }
}

#[test]
fn a_query_for_what_there_is_not_is_found() {
    for (query, error) in [
        ("sum(rate(interlock_aquire_total[5m]))", "there is no metric interlock_aquire_total"),
        ("rate(interlock_wait_ms[5m])", "there is no metric interlock_wait_ms"),
        ("sum by (route) (rate(interlock_acquire_total[5m]))", "have no label route"),
        ("interlock_deadlock_total{reason=\"deadlock\"}", "have no label reason"),
        ("interlock_acquire_total{reason=~\"deadlock|wait-time-out\"}", "called wait-time-out"),
        ("sum by (class) rate(interlock_acquire_total[5m])", ""),
    ] {
        let found = check(query).expect_err(query);
        assert!(found.contains(error), "{query}: {found}");
    }
}
