//! Text that images, paths and clients bring, for terminals and for programs that read lines.

use std::borrow::Cow;
use std::io::{self, Write};

/// Whether a terminal obeys a character, or a program takes it for the end of a line: control characters, the separators of lines that Unicode
/// has beside them, and what turns the direction of writing, so that what is seen is not what is there.
fn is_obeyed(shown: char) -> bool {
    let separates = matches!(shown, '\u{2028}' | '\u{2029}');
    let turns =
        matches!(shown, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    shown.is_control() || separates || turns
}

fn escaped(text: &str, kept: char, escape: impl Fn(char) -> String) -> Cow<'_, str> {
    let is_escaped = |shown: char| shown != kept && is_obeyed(shown);
    if !text.chars().any(is_escaped) {
        return text.into();
    }
    text.chars()
        .map(|shown| if is_escaped(shown) { escape(shown) } else { shown.to_string() })
        .collect::<String>()
        .into()
}

/// The text without what a terminal obeys, or ends a line: such characters are written as Rust writes them (`\n`, `\u{1b}`).
pub fn one_line(text: &str) -> Cow<'_, str> {
    // None is kept: this one is not obeyed.
    escaped(text, ' ', |shown| shown.escape_default().to_string())
}

/// JSON without what a terminal obeys within its strings. Its own ends of lines are kept; in strings JSON has none.
pub fn plain_json(text: &str) -> Cow<'_, str> {
    // All of them are in the first 65536 characters.
    escaped(text, '\n', |shown| format!("\\u{:04x}", u32::from(shown)))
}

/// Output of which nothing that an image, a path or a client brings steers a terminal, whatever forgets to escape it. Ends of lines are kept: what
/// is to be one line is that before.
#[derive(Debug)]
pub struct Plain<W>(pub W);

impl<W: Write> Write for Plain<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        self.0.write_all(plain_json(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_it_is_obeyed_and_the_rest_stays_as_it_is() {
        for text in ["", "/dev/mapper/a b", "größe.vhd", "a\\b"] {
            assert!(matches!(one_line(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(one_line("a\nvhd=b\r\t\x1b[2J\u{85}\0ü"), "a\\nvhd=b\\r\\t\\u{1b}[2J\\u{85}\\u{0}ü");
        assert_eq!(one_line("a\u{2028}b\u{202e}c\u{2066}"), "a\\u{2028}b\\u{202e}c\\u{2066}");
        assert_eq!(one_line("\u{61c}\u{200f}"), "\\u{61c}\\u{200f}");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({ "name": "a\n\u{1b}\u{7f}\u{9b}2J\u{2028}\u{202e}ü" });
        let text = serde_json::to_string_pretty(&value).unwrap();
        let plain = plain_json(&text);
        assert!(plain.chars().all(|shown| shown == '\n' || !is_obeyed(shown)), "{plain:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&plain).unwrap(), value);
    }

    #[test]
    fn output_keeps_its_lines_and_steers_no_terminal() {
        let mut out = Plain(Vec::new());
        let name = "a\u{1b}[2J";
        writeln!(out, "{name}: ü\r").unwrap();
        assert_eq!(String::from_utf8(out.0).unwrap(), "a\\u001b[2J: ü\\u000d\n");
    }
}
