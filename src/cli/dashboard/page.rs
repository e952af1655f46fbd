//! The page itself: HTML, style and scripts, which are files of the source tree and parts of the program.

/// Content-Type of the page.
pub(super) const HTML: &str = "text/html; charset=utf-8";
const STYLE_TYPE: &str = "text/css; charset=utf-8";
const SCRIPT_TYPE: &str = "text/javascript; charset=utf-8";

const PAGE: &str = include_str!("page/page.html");
const STYLE: (&str, &str) = ("style.css", include_str!("page/style.css"));
/// In the order in which they build on each other.
const SCRIPTS: [(&str, &str); 6] = [
    ("base.js", include_str!("page/base.js")),
    ("charts.js", include_str!("page/charts.js")),
    ("analysis.js", include_str!("page/analysis.js")),
    ("measured.js", include_str!("page/measured.js")),
    ("live.js", include_str!("page/live.js")),
    ("main.js", include_str!("page/main.js")),
];
/// Where the head of the page takes its parts.
const HEAD: &str = "<!-- parts -->";

/// A part of the page by its name, with its Content-Type.
pub(super) fn part(name: &str) -> Option<(&'static str, String)> {
    if name.is_empty() {
        return Some((HTML, served()));
    }
    if name == STYLE.0 {
        return Some((STYLE_TYPE, STYLE.1.to_owned()));
    }
    let script = SCRIPTS.iter().find(|(own, _)| *own == name)?;
    Some((SCRIPT_TYPE, script.1.to_owned()))
}

/// The page that fetches its parts and its figures from this program.
fn served() -> String {
    let mut head = format!("<link rel=\"stylesheet\" href=\"{}\">", STYLE.0);
    for (name, _) in SCRIPTS {
        head += &format!("\n<script src=\"{name}\" defer></script>");
    }
    PAGE.replacen(HEAD, &head, 1)
}

/// The page with everything in it. `data` is JSON; `nonce` marks what is the page's own and may run.
pub(super) fn whole(data: &str, nonce: &str) -> String {
    // Inside of a string only: nothing else in JSON has this letter. So no end of the element can be written there.
    let data = data.replace('<', "\\u003c");
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; base-uri 'none'; form-action 'none'"
    );
    let head = format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n<style nonce=\"{nonce}\">\n{}</style>",
        STYLE.1
    );
    let mut tail = format!("<script type=\"application/json\" id=\"data\">{data}</script>\n");
    for (_, script) in SCRIPTS {
        tail += &format!("<script nonce=\"{nonce}\">\n{script}</script>\n");
    }
    let page = PAGE.replacen(HEAD, &head, 1);
    match page.rsplit_once("</body>") {
        Some((body, end)) => format!("{body}{tail}</body>{end}"),
        None => page + &tail,
    }
}
