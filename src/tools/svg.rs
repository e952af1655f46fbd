//! Plots of lines over two linear axes as SVG, with a legend. The same plot gives the same bytes.

use plotters::prelude::*;

use crate::error::{Error, ErrorKind, Result};

const SIZE: (u32, u32) = (760, 480);
/// Told apart also by people who do not see all colours (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x7a, 0x51, 0x95),
    RGBColor(0x55, 0x55, 0x55),
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

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

impl Plot {
    /// The file.
    ///
    /// # Errors
    /// `Internal` when the drawing fails, a defect.
    pub fn to_svg(&self) -> Result<String> {
        let mut text = String::new();
        self.draw(&mut text).map_err(|error| {
            Error::new(
                ErrorKind::Internal,
                format!("draw the plot '{}': {error}", self.title),
            )
        })?;
        Ok(text)
    }

    fn draw(&self, text: &mut String) -> Drawn {
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let across = range(points().map(|point| point.0));
        let up = range(points().map(|point| point.1));
        let mut chart = ChartBuilder::on(&root)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(across, up)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (index, series) in self.series.iter().enumerate() {
            let colour = if series.bound {
                BLACK
            } else {
                COLOURS[index % COLOURS.len()]
            };
            let sample =
                move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(3));
            let points = series.points.iter().copied();
            if series.bound {
                let dashed = DashedLineSeries::new(points, 6, 4, colour.stroke_width(2));
                chart
                    .draw_series(dashed)?
                    .label(&series.name)
                    .legend(sample);
            } else {
                let line = LineSeries::new(points.clone(), colour.stroke_width(2));
                chart.draw_series(line)?.label(&series.name).legend(sample);
                chart.draw_series(points.map(|point| Circle::new(point, 3, colour.filled())))?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        drop(chart);
        root.present()?;
        Ok(())
    }
}

/// All values with a little room; something to draw on where there are none.
fn range(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    if !(low.is_finite() && high.is_finite()) {
        return 0.0..1.0;
    }
    let room = (high - low).max(1e-6) * 0.04;
    low - room..high + room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_draws_every_series_and_is_the_same_every_time() {
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
        let svg = plot.to_svg().unwrap();
        assert_eq!(
            svg.matches("<circle").count(),
            2,
            "one mark for each measured point"
        );
        for word in ["a &lt; b", "tq", "bound", "bits", "dB", "</svg>"] {
            assert!(svg.contains(word), "{word} is not in\n{svg}");
        }
        assert_eq!(plot.to_svg().unwrap(), svg);
    }

    #[test]
    fn no_points_are_an_empty_frame() {
        let plot = Plot {
            title: String::new(),
            x: String::new(),
            y: String::new(),
            series: Vec::new(),
        };
        assert!(plot.to_svg().unwrap().contains("<svg"));
    }
}
