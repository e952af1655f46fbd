//! Plots as SVG: lines over two linear axes, a legend, nothing else. Text in, text out; opens in any browser.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
/// Told apart also by people who do not see all colours (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#555555",
];

/// One line of a plot.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points in the order in which they are joined.
    pub points: Vec<(f64, f64)>,
    /// Drawn dashed and without marks: a bound, not a measurement.
    pub bound: bool,
}

/// A plot.
#[derive(Debug, Clone)]
pub struct Plot {
    /// Above it.
    pub title: String,
    /// Below the horizontal axis.
    pub x: String,
    /// Beside the vertical axis.
    pub y: String,
    /// What is drawn.
    pub series: Vec<Series>,
}

/// A range of round numbers around values, and its step: 1, 2 or 5 times a power of ten, four to nine of them.
fn axis(values: impl Iterator<Item = f64> + Clone) -> (f64, f64, f64) {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    if !(low.is_finite() && high.is_finite()) {
        return (0.0, 1.0, 0.25);
    }
    let span = (high - low).max(1e-9);
    let power = 10f64.powf((span / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|f| f * power)
        .find(|step| span / step <= 8.0)
        .unwrap_or(power * 10.0);
    (
        (low / step).floor() * step,
        (high / step).ceil() * step,
        step,
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

impl Plot {
    /// The file.
    #[must_use]
    pub fn to_svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let (x0, x1, x_step) = axis(points().map(|point| point.0));
        let (y0, y1, y_step) = axis(points().map(|point| point.1));
        let across = |x: f64| LEFT + (x - x0) / (x1 - x0).max(1e-9) * (WIDTH - LEFT - RIGHT);
        let down =
            |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0).max(1e-9) * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
        );
        let text = |x: f64, y: f64, anchor: &str, extra: &str, words: &str| {
            let words = escape(words);
            format!(
                "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{extra}>{words}</text>\n"
            )
        };
        svg += &text(
            LEFT,
            26.0,
            "start",
            " font-size=\"15\" font-weight=\"bold\"",
            &self.title,
        );
        svg += &text(
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 14.0,
            "middle",
            "",
            &self.x,
        );
        let turned = format!(" transform=\"rotate(-90 18 {:.1})\"", HEIGHT / 2.0);
        svg += &text(18.0, HEIGHT / 2.0, "middle", &turned, &self.y);
        let digits = |step: f64| {
            if step >= 1.0 {
                0
            } else {
                (-step.log10()).ceil() as usize
            }
        };
        for tick in 0..=((x1 - x0) / x_step).round() as usize {
            let x = x0 + tick as f64 * x_step;
            let at = across(x);
            let _ = writeln!(
                svg,
                "<path d=\"M{at:.1} {TOP}V{:.1}\" stroke=\"#e5e5e5\"/>",
                HEIGHT - BOTTOM
            );
            svg += &text(
                at,
                HEIGHT - BOTTOM + 18.0,
                "middle",
                "",
                &format!("{x:.*}", digits(x_step)),
            );
        }
        for tick in 0..=((y1 - y0) / y_step).round() as usize {
            let y = y0 + tick as f64 * y_step;
            let at = down(y);
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#e5e5e5\"/>",
                WIDTH - RIGHT
            );
            svg += &text(
                LEFT - 8.0,
                at + 4.0,
                "end",
                "",
                &format!("{y:.*}", digits(y_step)),
            );
        }
        for (index, series) in self.series.iter().enumerate() {
            let colour = if series.bound {
                "#000"
            } else {
                COLOURS[index % COLOURS.len()]
            };
            let line: Vec<String> = series
                .points
                .iter()
                .map(|(x, y)| format!("{:.1} {:.1}", across(*x), down(*y)))
                .collect();
            let dash = if series.bound {
                " stroke-dasharray=\"6 4\""
            } else {
                ""
            };
            let _ = writeln!(
                svg,
                "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"{dash}/>",
                line.join("L")
            );
            if !series.bound {
                for (x, y) in &series.points {
                    let _ = writeln!(
                        svg,
                        "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\" fill=\"{colour}\"/>",
                        across(*x),
                        down(*y)
                    );
                }
            }
            let y = TOP + 10.0 + 20.0 * index as f64;
            let x = WIDTH - RIGHT + 16.0;
            let _ = writeln!(
                svg,
                "<path d=\"M{x} {y}h22\" stroke=\"{colour}\" stroke-width=\"3\"{dash}/>"
            );
            svg += &text(x + 28.0, y + 4.0, "start", "", &series.name);
        }
        svg + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_round_and_hold_everything() {
        assert_eq!(axis([1.1, 8.9].into_iter()), (1.0, 9.0, 1.0));
        assert_eq!(axis([0.0, 53.0].into_iter()), (0.0, 60.0, 10.0));
        assert_eq!(axis(std::iter::empty()), (0.0, 1.0, 0.25));
    }

    #[test]
    fn a_plot_draws_every_series_inside_its_frame() {
        let series = |name: &str, bound| Series {
            name: name.to_owned(),
            points: vec![(1.0, 6.0), (8.0, 48.0)],
            bound,
        };
        let plot = Plot {
            title: "a < b".to_owned(),
            x: "bits".to_owned(),
            y: "dB".to_owned(),
            series: vec![series("tq", false), series("bound", true)],
        };
        let svg = plot.to_svg();
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(
            svg.contains("a &lt; b")
                && svg.contains("stroke-dasharray")
                && svg.ends_with("</svg>\n")
        );
        for part in svg.split("cx=\"").skip(1) {
            let x: f64 = part
                .split('"')
                .next()
                .and_then(|x| x.parse().ok())
                .expect("a number");
            assert!((LEFT..=WIDTH - RIGHT).contains(&x));
        }
    }
}
