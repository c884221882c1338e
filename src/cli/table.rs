//! Columns for people.

/// Lines with each column as wide as its widest cell.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(super) fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()] }
    }

    /// Adds a line.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The whole table; nothing but `nothing` when it has no lines.
    pub(super) fn render(&self, nothing: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{nothing}\n");
        }
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// `text` on one line, with what a terminal would obey escaped, and cut after `width` characters.
pub(super) fn short(text: &str, width: usize) -> String {
    let line: String = text.chars().flat_map(printable).collect();
    match line.char_indices().nth(width) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// A control character as its escape: what an event holds must not drive the reader's terminal.
fn printable(character: char) -> Vec<char> {
    if character.is_control() { character.escape_default().collect() } else { vec![character] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "N"]);
        table.row(["größe".to_owned(), "1".to_owned()]);
        table.row(["x".to_owned(), String::new()]);
        assert_eq!(table.render("none"), "NAME   N\ngröße  1\nx\n");
        assert_eq!(Table::new(&["NAME"]).render("none"), "none\n");
    }

    #[test]
    fn nothing_shown_drives_the_terminal() {
        assert_eq!(short("a\u{1b}[2Jb\n", 80), "a\\u{1b}[2Jb\\n");
        assert_eq!(short("abcdef", 3), "abc…");
    }
}
