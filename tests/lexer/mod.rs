//! As much of Rust's lexer as `tests/layers.rs` needs: words, punctuation, strings and comments with their lines.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An identifier, keyword or number; a lifetime too.
    Word,
    /// One character of punctuation.
    Punct,
    /// The inside of a string or character literal.
    Text,
    /// A comment with its marks.
    Comment,
}

#[derive(Clone, Debug)]
pub struct Token {
    pub kind: Kind,
    pub text: String,
    /// 1-based, of its first character.
    pub line: usize,
}

impl Token {
    /// Whether it is this word or punctuation: `"crate"` in a string is not.
    pub fn is(&self, text: &str) -> bool {
        matches!(self.kind, Kind::Word | Kind::Punct) && self.text == text
    }
}

/// Whether `::` stands at `at`.
pub fn is_path_separator(code: &[Token], at: usize) -> bool {
    code.get(at + 2).is_some() && code[at].is(":") && code[at + 1].is(":")
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// All tokens of a file that compiles.
pub fn tokens(text: &str) -> Vec<Token> {
    let c: Vec<char> = text.chars().collect();
    let at = |i: usize| c.get(i).copied().unwrap_or('\0');
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    while i < c.len() {
        let begin = i;
        let (kind, inside) = match at(i) {
            ch if ch.is_whitespace() => {
                line += usize::from(ch == '\n');
                i += 1;
                continue;
            }
            '/' if at(i + 1) == '/' => {
                i = (i..c.len()).find(|&j| at(j) == '\n').unwrap_or(c.len());
                (Kind::Comment, begin..i)
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= c.len() {
                        break;
                    }
                }
                (Kind::Comment, begin..i)
            }
            '"' => {
                i += 1;
                while i < c.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
                (Kind::Text, begin + 1..i - 1)
            }
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while at(i) != '\'' {
                    i += 1;
                }
                i += 1;
                (Kind::Text, begin + 1..i - 1)
            }
            ch if is_word(ch) || ch == '\'' => {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
                let hashes = (i..c.len()).take_while(|&j| at(j) == '#').count();
                let prefix: String = c[begin..i].iter().collect();
                if matches!(prefix.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    let first = i + hashes + 1;
                    let ends = |j: usize| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
                    let last = (first..c.len()).find(|&j| ends(j)).unwrap_or(c.len());
                    i = last + 1 + hashes;
                    (Kind::Text, first..last)
                } else if matches!(prefix.as_str(), "b" | "c") && matches!(at(i), '"' | '\'') {
                    continue; // the literal follows
                } else {
                    (Kind::Word, begin..i)
                }
            }
            _ => {
                i += 1;
                (Kind::Punct, begin..i)
            }
        };
        let inside = inside.start..inside.end.min(c.len());
        out.push(Token { kind, text: c[inside].iter().collect(), line });
        line += c[begin..i.min(c.len())].iter().filter(|&&ch| ch == '\n').count();
    }
    out
}

/// The code without the items under `#[cfg(test)]`, or under any condition that begins with `all(test`.
pub fn without_test_items(code: Vec<Token>) -> Vec<Token> {
    let begins = |i: usize, words: &[&str]| words.iter().enumerate().all(|(k, w)| code.get(i + k).is_some_and(|t| t.is(w)));
    let mut out = Vec::new();
    let mut i = 0;
    while i < code.len() {
        if begins(i, &["#", "[", "cfg", "(", "test", ")"]) || begins(i, &["#", "[", "cfg", "(", "all", "(", "test"]) {
            // An item ends at its first `;`, or with its braces.
            let mut depth = 0;
            while i < code.len() {
                depth += i32::from(code[i].is("{")) - i32::from(code[i].is("}"));
                let ended = depth == 0 && (code[i].is(";") || code[i].is("}"));
                i += 1;
                if ended {
                    break;
                }
            }
        } else {
            out.push(code[i].clone());
            i += 1;
        }
    }
    out
}
