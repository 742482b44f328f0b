//! Text that images, paths and clients bring, for terminals and for programs that read lines.

use std::borrow::Cow;

/// The text without what a terminal obeys, or ends a line: control characters are written as Rust writes them (`\n`, `\u{1b}`).
pub fn one_line(text: &str) -> Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return text.into();
    }
    let escaped = |shown: char| match shown.is_control() {
        true => shown.escape_default().to_string(),
        false => shown.to_string(),
    };
    text.chars().map(escaped).collect::<String>().into()
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
    }
}
