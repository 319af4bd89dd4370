//! An SVG that knows how much room its texts take: what is drawn, where, and what lies on top of something else.
//!
//! The charts say what they show. A reader's font is unknown, so widths are those of a wide one (DejaVu Sans).

use std::fmt::Write as _;

/// Colours of the charts. They bring their own background, so that a dark page changes nothing.
pub(crate) const PAPER: &str = "#ffffff";
pub(crate) const INK: &str = "#212529";
pub(crate) const FAINT: &str = "#5c636a";
pub(crate) const RULE: &str = "#dee2e6";
/// Bars: ours, other contenders', and what bounds them all.
pub(crate) const OURS: &str = "#d9480f";
pub(crate) const OTHERS: &str = "#868e96";
pub(crate) const BOUNDS: &str = "#ced4da";

/// Which end of a text stands at its `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    End,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) size: f64,
    pub(crate) bold: bool,
    pub(crate) colour: &'static str,
    pub(crate) anchor: Anchor,
}

impl Style {
    pub(crate) const fn plain(size: f64) -> Self {
        Self {
            size,
            bold: false,
            colour: INK,
            anchor: Anchor::Start,
        }
    }

    pub(crate) const fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    pub(crate) const fn coloured(self, colour: &'static str) -> Self {
        Self { colour, ..self }
    }

    pub(crate) const fn ending(self) -> Self {
        Self {
            anchor: Anchor::End,
            ..self
        }
    }
}

/// A rectangle that something covers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Extent {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

#[cfg(test)]
impl Extent {
    fn meets(&self, other: &Self) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }
}

pub(crate) struct Drawing {
    width: f64,
    body: String,
    /// Texts and bars, which must not cover each other.
    covered: Vec<(String, Extent)>,
    bottom: f64,
}

impl Drawing {
    pub(crate) fn new(width: f64) -> Self {
        Self {
            width,
            body: String::new(),
            covered: Vec::new(),
            bottom: 0.0,
        }
    }

    /// Writes `content` on the base line `y`, and returns where it ends.
    pub(crate) fn text(&mut self, x: f64, y: f64, style: Style, content: &str) -> f64 {
        let width = width_of(content, style.size, style.bold);
        let left = match style.anchor {
            Anchor::Start => x,
            Anchor::End => x - width,
        };
        self.cover(
            content,
            Extent {
                left,
                top: y - 0.8 * style.size,
                right: left + width,
                bottom: y + 0.25 * style.size,
            },
        );
        let anchor = match style.anchor {
            Anchor::Start => "",
            Anchor::End => " text-anchor=\"end\"",
        };
        let weight = if style.bold {
            " font-weight=\"bold\""
        } else {
            ""
        };
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{}\" fill=\"{}\"{weight}{anchor}>{}</text>",
            style.size,
            style.colour,
            escaped(content)
        );
        left + width
    }

    /// A bar that begins at `x` and is `length` long.
    pub(crate) fn bar(&mut self, x: f64, top: f64, length: f64, height: f64, colour: &str) {
        self.cover(
            "a bar",
            Extent {
                left: x,
                top,
                right: x + length,
                bottom: top + height,
            },
        );
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    /// The line that bars begin at.
    pub(crate) fn base_line(&mut self, x: f64, top: f64, bottom: f64) {
        let _ = writeln!(
            self.body,
            "<path d=\"M{x:.1} {top:.1}V{bottom:.1}\" stroke=\"{FAINT}\"/>"
        );
    }

    fn cover(&mut self, what: &str, extent: Extent) {
        self.bottom = self.bottom.max(extent.bottom);
        self.covered.push((what.to_owned(), extent));
    }

    /// Every text that leaves the drawing or meets another text or a bar.
    #[cfg(test)]
    pub(crate) fn collisions(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (at, (what, extent)) in self.covered.iter().enumerate() {
            if extent.left < 0.0 || extent.right > self.width || extent.top < 0.0 {
                found.push(format!("{what:?} leaves the drawing: {extent:?}"));
            }
            for (other, met) in &self.covered[at + 1..] {
                if extent.meets(met) {
                    found.push(format!("{what:?} and {other:?} meet"));
                }
            }
        }
        found
    }

    pub(crate) fn svg(&self, title: &str) -> String {
        let (width, height) = (self.width, (self.bottom + 14.0).ceil());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" role=\"img\">\n\
             <title>{}</title>\n<rect x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\" fill=\"{PAPER}\" \
             stroke=\"{RULE}\"/>\n{}</svg>\n",
            escaped(title),
            width - 1.0,
            height - 1.0,
            self.body
        )
    }
}

/// About how wide a text is in a wide font.
pub(crate) fn width_of(text: &str, size: f64, bold: bool) -> f64 {
    let widths = text.chars().map(|c| match c {
        'i' | 'j' | 'l' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' | ' ' => 0.33,
        'f' | 'r' | 't' | '-' | '(' | ')' | '/' => 0.42,
        'm' | 'M' | 'w' | 'W' | '–' | '×' | '%' => 0.98,
        'A'..='Z' => 0.76,
        _ => 0.635,
    });
    widths.sum::<f64>() * size * if bold { 1.12 } else { 1.0 }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_on_a_bar_or_outside_is_found() {
        let mut drawing = Drawing::new(100.0);
        drawing.text(2.0, 12.0, Style::plain(10.0), "fits");
        assert_eq!(drawing.collisions(), Vec::<String>::new());
        drawing.bar(20.0, 4.0, 30.0, 10.0, OURS);
        assert_eq!(drawing.collisions(), ["\"fits\" and \"a bar\" meet"]);

        let mut drawing = Drawing::new(100.0);
        drawing.text(60.0, 12.0, Style::plain(10.0), "goes too far");
        assert!(drawing.collisions()[0].contains("leaves the drawing"));
        let mut drawing = Drawing::new(100.0);
        drawing.text(30.0, 12.0, Style::plain(10.0).ending(), "goes too far");
        assert!(drawing.collisions()[0].contains("leaves the drawing"));
    }

    #[test]
    fn signs_of_markup_are_escaped() {
        let mut drawing = Drawing::new(100.0);
        drawing.text(2.0, 12.0, Style::plain(10.0), "a<b&c");
        assert!(drawing.svg("x>y").contains(">a&lt;b&amp;c</text>"));
        assert!(drawing.svg("x>y").contains("<title>x&gt;y</title>"));
    }
}
