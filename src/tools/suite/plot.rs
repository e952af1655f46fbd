//! Plots of cases as SVG: one bar for each row, with its least and most, and the drive's own lines where bars are rates.
//!
//! The same report gives the same bytes. Colours are told apart without colours too: every bar has its name beside it.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::CaseReport;
use crate::error::{Error, ErrorKind, Result};

const WIDTH: u32 = 900;
const LABEL_WIDTH: u32 = 300;
const VALUE_WIDTH: u32 = 110;
const HEAD_HEIGHT: u32 = 56;
const BAR_HEIGHT: u32 = 24;
const FLEA: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const OTHERS: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);
const DRIVE: RGBColor = RGBColor(0xc0, 0x39, 0x2b);

struct Bar<'a> {
    label: &'a str,
    median: f64,
    min: f64,
    max: f64,
}

/// The plot of a case that has one.
///
/// # Errors
/// `Internal` when the drawing fails, a defect.
pub fn svg(case: &CaseReport) -> Result<Option<String>> {
    let Some(name) = &case.plot else {
        return Ok(None);
    };
    let bars: Vec<Bar<'_>> = case
        .rows
        .rows
        .iter()
        .filter_map(|row| {
            let series = &row.measure(name)?.series;
            Some(Bar {
                label: &row.label,
                median: series.median()?,
                min: series.min()?,
                max: series.max()?,
            })
        })
        .collect();
    if bars.is_empty() {
        return Ok(None);
    }
    let mut text = String::new();
    draw(&mut text, case, name, &bars).map_err(|error| {
        Error::new(
            ErrorKind::Internal,
            format!("draw the plot of {}: {error}", case.name),
        )
    })?;
    Ok(Some(text))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(text: &mut String, case: &CaseReport, name: &str, bars: &[Bar<'_>]) -> Drawn {
    let height = HEAD_HEIGHT + BAR_HEIGHT * bars.len() as u32 + 36;
    let root = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let font = |size: i32| ("sans-serif", size).into_font();
    root.draw(&Text::new(
        format!("{} ({name})", case.title),
        (16, 14),
        font(18),
    ))?;
    let drive = (name == "GB/s").then(|| case.fio_large.median()).flatten();
    let longest = bars
        .iter()
        .map(|bar| bar.max)
        .chain(drive)
        .fold(f64::MIN_POSITIVE, f64::max);
    let room = f64::from(WIDTH - LABEL_WIDTH - VALUE_WIDTH);
    let at = |value: f64| LABEL_WIDTH as i32 + (value / longest * room).round() as i32;
    for (index, bar) in bars.iter().enumerate() {
        let top = (HEAD_HEIGHT + BAR_HEIGHT * index as u32) as i32;
        let middle = top + BAR_HEIGHT as i32 / 2;
        let right = Pos::new(HPos::Right, VPos::Center);
        let label = font(13).into_text_style(&root).pos(right);
        root.draw(&Text::new(
            bar.label.to_owned(),
            (LABEL_WIDTH as i32 - 8, middle),
            label,
        ))?;
        let colour = if bar.label.contains("flea") {
            FLEA
        } else {
            OTHERS
        };
        let corners = [
            (at(0.0), top + 4),
            (at(bar.median), top + BAR_HEIGHT as i32 - 4),
        ];
        root.draw(&Rectangle::new(corners, colour.filled()))?;
        root.draw(&PathElement::new(
            [(at(bar.min), middle), (at(bar.max), middle)],
            BLACK,
        ))?;
        let value = font(13)
            .into_text_style(&root)
            .pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(
            number(bar.median),
            (at(bar.max) + 8, middle),
            value,
        ))?;
    }
    if let Some(drive) = drive {
        let bottom = (height - 30) as i32;
        root.draw(&PathElement::new(
            [(at(drive), HEAD_HEIGHT as i32 - 6), (at(drive), bottom)],
            DRIVE,
        ))?;
        let style = font(12)
            .into_text_style(&root)
            .color(&DRIVE)
            .pos(Pos::new(HPos::Center, VPos::Top));
        let words = format!("fio, same footprint: {drive:.2}");
        root.draw(&Text::new(words, (at(drive), bottom + 4), style))?;
    }
    root.present()?;
    Ok(())
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        large if large >= 10.0 => format!("{value:.1}"),
        large if large >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::suite::report::Spec;

    #[test]
    fn a_plot_names_every_bar_and_is_the_same_every_time() {
        let mut case = super::super::blank("x", "Title", "About", "m.gguf".as_ref());
        assert_eq!(svg(&case).unwrap(), None, "nothing to plot");
        case.plot = Some("GB/s".to_owned());
        for rate in [1.9, 2.0, 1.95] {
            case.rows.add("flea, 10 %", Spec::figure("GB/s", 2), rate);
            case.rows.add("peer", Spec::figure("GB/s", 2), rate / 2.0);
            case.fio_large.add(2.0);
        }
        let text = svg(&case).unwrap().unwrap();
        for word in [
            "<svg",
            "Title (GB/s)",
            "flea, 10 %",
            "peer",
            "fio, same footprint: 2.00",
            "1.95",
        ] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        assert_eq!(svg(&case).unwrap(), Some(text));
    }
}
