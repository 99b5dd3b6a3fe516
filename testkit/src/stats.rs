//! What Envoy's admin endpoint says about its stats, as values a test can ask for.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

/// One line of `/stats/prometheus`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric's name, `interlock_acquire_total` say.
    pub name: String,
    /// Its labels, as the bootstrap's `stats_tags` cut them.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// Reads `/stats?format=json`: every counter and gauge by its full name.
pub fn parse_json(text: &str) -> Result<BTreeMap<String, u64>> {
    let all: Value = serde_json::from_str(text).context("/stats?format=json is not JSON")?;
    let stats = all.get("stats").and_then(Value::as_array).context("/stats?format=json has no stats")?;
    let pair = |stat: &Value| Some((stat.get("name")?.as_str()?.to_owned(), stat.get("value")?.as_u64()?));
    Ok(stats.iter().filter_map(pair).collect())
}

/// Reads Prometheus' text format.
pub fn parse_prometheus(text: &str) -> Result<Vec<Sample>> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(sample).collect()
}

fn sample(line: &str) -> Result<Sample> {
    let odd = || format!("not a line of Prometheus' text format: {line}");
    let (series, value) = line.rsplit_once(' ').with_context(odd)?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}').with_context(odd)?),
        None => (series, ""),
    };
    Ok(Sample { name: name.to_owned(), labels: parse_labels(labels), value: value.parse().with_context(odd)? })
}

fn parse_labels(mut text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    while let Some((key, rest)) = text.split_once("=\"") {
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    end = at + 1;
                    break;
                }
                '\\' => value.extend(chars.next().map(|(_, c)| if c == 'n' { '\n' } else { c })),
                c => value.push(c),
            }
        }
        labels.insert(key.trim_start_matches(',').to_owned(), value);
        text = &rest[end..];
    }
    labels
}

/// The sum of the samples called `name` that carry all of `labels`; 0 where there is none.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let carries = |s: &&Sample| labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|have| have == v));
    samples.iter().filter(|s| s.name == name).filter(carries).map(|s| s.value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_prometheus_text() {
        let text = "# TYPE a counter\na{class=\"order\",le=\"0.5\"} 3\na{class=\"x,\\\"}\"} 4\nb{} 1.5\nc 2\n";
        let samples = parse_prometheus(text).unwrap();
        assert_eq!(samples.len(), 4);
        assert_eq!(sum(&samples, "a", &[]), 7.0);
        assert_eq!(sum(&samples, "a", &[("class", "order")]), 3.0);
        assert_eq!(sum(&samples, "a", &[("class", "x,\"}")]), 4.0);
        assert_eq!(sum(&samples, "b", &[]), 1.5);
        assert_eq!(sum(&samples, "missing", &[]), 0.0);
    }

    #[test]
    fn reads_json_stats_and_passes_over_text_and_histograms() {
        let text = r#"{"stats":[{"name":"a","value":3},{"name":"t","value":"text"},{"histograms":{}}]}"#;
        assert_eq!(parse_json(text).unwrap(), BTreeMap::from([("a".to_owned(), 3)]));
    }
}
