//! A finding as a picture: a bar a row, with the quartiles on it.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::report::{Finding, Spread};

const WIDTH: u32 = 900;
/// Of one bar, and of everything around them.
const BAR: u32 = 34;
const AROUND: u32 = 130;
/// Of the names of the rows.
const NAMES: u32 = 330;

/// Draws one column of a finding, as SVG.
pub fn draw(finding: &Finding, column: usize, file: &Path) -> Result<()> {
    let bars: Vec<(&str, Spread)> =
        finding.rows.iter().filter_map(|row| Some((row.name.as_str(), (*row.cells.get(column)?)?))).collect();
    if bars.is_empty() {
        return Ok(());
    }
    paint(finding, column, &bars, file).map_err(|e| anyhow!("cannot draw {}: {e}", file.display()))
}

fn paint(
    finding: &Finding,
    column: usize,
    bars: &[(&str, Spread)],
    file: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = u32::try_from(bars.len())?;
    let area = SVGBackend::new(file, (WIDTH, rows * BAR + AROUND)).into_drawing_area();
    area.fill(&WHITE)?;
    let most = bars.iter().map(|(_, spread)| spread.upper.max(spread.median)).fold(0.0, f64::max);
    let least = bars.iter().map(|(_, spread)| spread.lower.min(spread.median)).fold(0.0, f64::min);
    let most = if most > least { most + (most - least) * 0.05 } else { least + 1.0 };
    // The first row is the topmost.
    let height = bars.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption(&finding.title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(50)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(least..most, height..0.0)?;
    let unit = finding.columns.get(column).map_or("", |column| column.name.as_str());
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_desc(unit).label_style(("sans-serif", 14)).draw()?;
    for (at, (name, spread)) in bars.iter().enumerate() {
        let (top, middle) = (at as f64 + 0.2, at as f64 + 0.5);
        let corners = [(0.0, top), (spread.median, at as f64 + 0.8)];
        chart.draw_series([Rectangle::new(corners, RGBColor(90, 130, 190).filled())])?;
        let whisker = vec![(spread.lower, middle), (spread.upper, middle)];
        chart.draw_series([PathElement::new(whisker, BLACK.stroke_width(2))])?;
        let (x, y) = chart.backend_coord(&(least, middle));
        let style = TextStyle::from(("sans-serif", 14).into_font()).color(&BLACK);
        use plotters::style::text_anchor::{HPos, Pos, VPos};
        area.draw_text(name, &style.pos(Pos::new(HPos::Right, VPos::Center)), (x - 8, y))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Unit;

    #[test]
    fn a_finding_becomes_a_picture_with_its_names() {
        let mut finding = Finding::new("cost", "What it costs", &[("of plain", Unit::Ratio)]);
        finding.row("plain Envoy", &[vec![1.0]]);
        finding.row("a lock", &[vec![0.7, 0.8, 0.9]]);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cost.svg");
        draw(&finding, 0, &file).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        assert!(
            svg.starts_with("<svg") && ["plain Envoy", "a lock", "of plain"].iter().all(|text| svg.contains(text)),
            "{svg}"
        );
    }
}
