//! What the bench found, as numbers with their spread: as Markdown tables, as JSON, and against what was aimed at.
//!
//! Measures nothing.

use std::collections::BTreeMap;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};
use interlock_testkit::tools::Missing;
use serde::Serialize;

/// A median, with the quartiles around it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub lower: f64,
    pub upper: f64,
    /// How many values it is of.
    pub of: usize,
}

impl Spread {
    /// Of these values; nothing of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |quantile: f64| {
            let place = quantile * (sorted.len().checked_sub(1)? as f64);
            let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            Some(low + (high - low) * place.fract())
        };
        Some(Spread { median: at(0.5)?, lower: at(0.25)?, upper: at(0.75)?, of: sorted.len() })
    }
}

/// What a column is, and so how its numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Times the baseline.
    Ratio,
    PerSecond,
    Micros,
    Millis,
    Kib,
}

impl Unit {
    fn write(self, value: f64) -> String {
        match self {
            Unit::Ratio => format!("{value:.3}"),
            Unit::PerSecond => format!("{value:.0}"),
            Unit::Micros => format!("{value:.1}"),
            Unit::Kib => format!("{value:.2}"),
            Unit::Millis => format!("{value:.3}"),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Column {
    pub name: String,
    pub unit: Unit,
}

#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub name: String,
    /// One a column; where there is none it does not apply.
    pub cells: Vec<Option<Spread>>,
}

/// What could not be measured, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    pub what: String,
    pub why: String,
}

/// The answer to one question.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// The question's name, as on the command line.
    pub question: String,
    pub title: String,
    pub columns: Vec<Column>,
    pub rows: Vec<Row>,
    /// How many of the columns the table shows.
    #[serde(skip)]
    pub shown: usize,
    /// The column that is drawn.
    pub charted: usize,
    /// How to read it.
    pub notes: Vec<String>,
    pub skipped: Vec<Skipped>,
}

impl Finding {
    pub fn new(question: &str, title: &str, columns: &[(&str, Unit)]) -> Self {
        let column = |(name, unit): &(&str, Unit)| Column { name: (*name).to_owned(), unit: *unit };
        Finding {
            question: question.to_owned(),
            title: title.to_owned(),
            columns: columns.iter().map(column).collect(),
            rows: Vec::new(),
            shown: columns.len(),
            charted: 0,
            notes: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// One more row: the values of each column.
    pub fn row(&mut self, name: &str, values: &[Vec<f64>]) {
        let cells = values.iter().map(|values| Spread::of(values)).collect();
        self.rows.push(Row { name: name.to_owned(), cells });
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Goes on without this where a tool is missing for it, and says so on the terminal too.
    ///
    /// # Errors
    /// Any other error: what is there must work.
    pub fn skip(&mut self, what: &str, why: anyhow::Error) -> Result<()> {
        let why = why.downcast::<Missing>()?.to_string();
        println!("skipped: {what}: {why}\n");
        self.skipped.push(Skipped { what: what.to_owned(), why });
        Ok(())
    }

    /// The cell of these names.
    pub fn cell(&self, row: &str, column: &str) -> Option<Spread> {
        let at = self.columns.iter().position(|c| c.name == column)?;
        *self.rows.iter().find(|r| r.name == row)?.cells.get(at)?
    }

    /// As a section of a Markdown page.
    pub fn markdown(&self) -> String {
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN);
        let names = self.columns.iter().take(self.shown).map(|column| column.name.clone());
        table.set_header([String::new()].into_iter().chain(names));
        for row in &self.rows {
            let cells = row
                .cells
                .iter()
                .zip(&self.columns)
                .take(self.shown)
                .map(|(cell, column)| cell.map_or_else(String::new, |cell| written(cell, column.unit)));
            table.add_row([row.name.clone()].into_iter().chain(cells));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = format!("### {}\n\n{table}\n", self.title);
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        for Skipped { what, why } in &self.skipped {
            text += &format!("\nskipped: {what}: {why}\n");
        }
        text
    }
}

/// The median, and the quartiles where there is more than one value.
fn written(spread: Spread, unit: Unit) -> String {
    let median = unit.write(spread.median);
    if spread.lower == spread.upper {
        return median;
    }
    format!("{median} ({} to {})", unit.write(spread.lower), unit.write(spread.upper))
}

/// Something that was aimed at.
pub struct Target {
    pub what: &'static str,
    /// What must hold, and what is the goal.
    pub gate: f64,
    pub goal: f64,
    pub more_is_better: bool,
    pub unit: Unit,
    /// The number, from the findings.
    pub found: fn(&Findings) -> Option<f64>,
}

/// All findings, by question.
#[derive(Default)]
pub struct Findings(pub BTreeMap<String, Finding>);

impl Findings {
    pub fn median(&self, question: &str, row: &str, column: &str) -> Option<f64> {
        Some(self.0.get(question)?.cell(row, column)?.median)
    }
}

#[derive(Debug, Serialize)]
pub struct Verdict {
    pub what: &'static str,
    pub gate: f64,
    pub goal: f64,
    /// None where it was not measured.
    pub found: Option<f64>,
    pub verdict: &'static str,
    #[serde(skip)]
    unit: Unit,
}

/// What was aimed at, and what came of it.
pub fn verdicts(targets: &[Target], findings: &Findings) -> Vec<Verdict> {
    let judge = |target: &Target| {
        let found = (target.found)(findings);
        let reaches = |aim: f64| found.map(|found| if target.more_is_better { found >= aim } else { found <= aim });
        let verdict = match (reaches(target.goal), reaches(target.gate)) {
            (Some(true), _) => "goal met",
            (_, Some(true)) => "gate met, goal not",
            (_, Some(false)) => "NOT MET",
            (_, None) => "not measured",
        };
        let Target { what, gate, goal, unit, .. } = *target;
        Verdict { what, gate, goal, found, verdict, unit }
    };
    targets.iter().map(judge).collect()
}

/// As a section of a Markdown page; nothing of none.
pub fn judged(verdicts: &[Verdict]) -> String {
    if verdicts.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(["", "gate", "goal", "found", ""]);
    for Verdict { what, gate, goal, found, verdict, unit } in verdicts {
        let found = found.map_or_else(String::new, |found| unit.write(found));
        table.add_row([(*what).to_owned(), unit.write(*gate), unit.write(*goal), found, (*verdict).to_owned()]);
    }
    format!("### What was aimed at\n\n{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_quartiles() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0, 5.0]).unwrap();
        assert_eq!((spread.lower, spread.median, spread.upper, spread.of), (2.0, 3.0, 4.0, 5));
        assert_eq!(Spread::of(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn findings_are_written_and_judged() {
        let mut finding = Finding::new("cost", "What it costs", &[("of plain", Unit::Ratio), ("CPU", Unit::Micros)]);
        finding.row("a lock", &[vec![0.8, 0.82, 0.81], vec![]]);
        finding.skip("another", Missing("there is none".to_owned()).into()).unwrap();
        assert!(finding.skip("a third", anyhow::anyhow!("it broke")).is_err());
        let text = finding.markdown();
        assert!(text.contains("| a lock | 0.810 (0.805 to 0.815) |"), "{text}");
        assert!(text.contains("skipped: another: there is none"), "{text}");
        let findings = Findings(BTreeMap::from([("cost".to_owned(), finding)]));
        let target = |gate, goal, row: fn(&Findings) -> Option<f64>| Target {
            what: "a lock",
            gate,
            goal,
            more_is_better: true,
            unit: Unit::Ratio,
            found: row,
        };
        let there = |f: &Findings| f.median("cost", "a lock", "of plain");
        let targets = [
            target(0.7, 0.8, there),
            target(0.8, 0.9, there),
            target(0.9, 1.0, there),
            target(0.9, 1.0, |f| f.median("cost", "a lock", "CPU")),
        ];
        let told: Vec<_> = verdicts(&targets, &findings).iter().map(|verdict| verdict.verdict).collect();
        assert_eq!(told, ["goal met", "gate met, goal not", "NOT MET", "not measured"]);
    }
}
