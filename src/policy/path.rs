//! Paths: the patterns of rules, and the one spelling in which a request's path is compared with them.

use std::cmp::Reverse;

use super::reader::quote;

/// The most captures that a pattern may have; matchit has names for 25.
const MAX_CAPTURES: usize = 16;

/// The longest pattern, in bytes.
const MAX_PATTERN: usize = 1024;

/// A part of a pattern between slashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    /// This text.
    Literal(String),
    /// Any text, of one byte or more, between these two.
    Capture { prefix: String, suffix: String },
    /// All the rest of the path, slashes included.
    Rest,
}

impl Segment {
    /// Where the segment stands among those that match the same text: the more exact comes first, as in matchit.
    fn exactness(&self) -> (u8, Reverse<usize>) {
        match self {
            Segment::Literal(_) => (0, Reverse(0)),
            Segment::Capture { prefix, suffix } if !suffix.is_empty() => (1, Reverse(prefix.len() + suffix.len())),
            Segment::Capture { prefix, .. } if !prefix.is_empty() => (2, Reverse(prefix.len())),
            Segment::Capture { .. } => (3, Reverse(0)),
            Segment::Rest => (4, Reverse(0)),
        }
    }
}

/// What a rule says of the path, in the syntax of matchit. Two patterns with equal segments match the same paths.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    pub(super) segments: Vec<Segment>,
    /// The names of the captures, in their order.
    pub(super) captures: Vec<String>,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong and the fix, to stand behind the quoted text.
    pub(super) fn parse(text: &str) -> Result<Pattern, String> {
        let Some(relative) = text.strip_prefix('/') else {
            return Err("does not begin with \"/\"; write the whole path".into());
        };
        if text.len() > MAX_PATTERN {
            return Err(format!("is too long; a path has at most {MAX_PATTERN} bytes"));
        }
        if let Some(mark) = text.chars().find(|c| matches!(c, '?' | '#')) {
            return Err(format!("has a \"{mark}\"; a path ends before it. Match the path alone"));
        }
        let mut pattern = Pattern { segments: Vec::new(), captures: Vec::new() };
        let mut segments = relative.split('/').peekable();
        while let Some(segment) = segments.next() {
            let is_last = segments.peek().is_none();
            let segment = pattern.segment(segment, is_last)?;
            pattern.segments.push(segment);
        }
        if pattern.captures.len() > MAX_CAPTURES {
            return Err(format!("has over {MAX_CAPTURES} captures; use fewer"));
        }
        Ok(pattern)
    }

    fn segment(&mut self, text: &str, is_last: bool) -> Result<Segment, String> {
        let mut literal = String::new();
        let mut prefix = None;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let behind = rest.strip_prefix(c).unwrap_or_default();
            // A doubled brace is the brace itself.
            if (c == '{' || c == '}') && behind.starts_with(c) {
                literal.push(c);
                rest = behind.strip_prefix(c).unwrap_or_default();
            } else if c == '}' {
                return Err("has a \"}\" without its \"{\"; write \"}}\" for the character".into());
            } else if c == '{' {
                let (name, behind) =
                    behind.split_once('}').ok_or("has a \"{\" without its \"}\"; write \"{{\" for the character")?;
                if prefix.is_some() {
                    return Err("has two captures in one segment; only one can be told apart".into());
                }
                if let Some(name) = name.strip_prefix('*') {
                    if !is_last || text != format!("{{*{name}}}") {
                        let rest = quote(&format!("{{*{name}}}"));
                        return Err(format!("has {rest} in its middle; it must be the whole last segment"));
                    }
                    self.capture(name)?;
                    return Ok(Segment::Rest);
                }
                self.capture(name)?;
                prefix = Some(std::mem::take(&mut literal));
                rest = behind;
            } else {
                literal.push(c);
                rest = behind;
            }
        }
        let literal = spelling(&literal)?;
        match prefix {
            None => Ok(Segment::Literal(literal)),
            Some(prefix) => Ok(Segment::Capture { prefix: spelling(&prefix)?, suffix: literal }),
        }
    }

    fn capture(&mut self, name: &str) -> Result<(), String> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(word) {
            return Err(format!("has a capture {}; name it with 1 to 64 of A-Z a-z 0-9 _ -", quote(name)));
        }
        if matches!(name, "method" | "principal") {
            return Err(format!("has a capture {name:?}, which is a source of its own; name it otherwise"));
        }
        if self.captures.iter().any(|earlier| earlier == name) {
            return Err(format!("captures {name:?} twice; give one of them another name"));
        }
        self.captures.push(name.to_owned());
        Ok(())
    }

    /// The pattern for matchit. Captures are named by their number: the same for all rules, so that they can coexist.
    pub(super) fn route(&self) -> String {
        let mut route = String::new();
        let mut number = 0..;
        for segment in &self.segments {
            route.push('/');
            match segment {
                Segment::Literal(text) => route.push_str(text),
                Segment::Capture { prefix, suffix } => {
                    route.push_str(&format!("{prefix}{{p{}}}{suffix}", number.next().unwrap_or(0)));
                }
                Segment::Rest => route.push_str("{*rest}"),
            }
        }
        route
    }

    /// Whether a capture has text behind it in its segment.
    pub(super) fn has_suffix(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment, Segment::Capture { suffix, .. } if !suffix.is_empty()))
    }

    /// For sorting: the more exact pattern first.
    pub(super) fn exactness(&self) -> impl Ord {
        self.segments.iter().map(Segment::exactness).collect::<Vec<_>>()
    }
}

/// A literal part in the spelling of [`normalize`].
fn spelling(text: &str) -> Result<String, String> {
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte == b'%' && !matches!(tail, [a, b, ..] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()) {
            return Err("has a \"%\" without two hexadecimal digits behind it; write \"%25\" for the character".into());
        }
    }
    Ok(normalize(text.as_bytes()))
}

/// The path of a request without its query, in the one spelling in which paths are compared: percent-encoded
/// characters that need no encoding are decoded, hexadecimal digits are upper-case (RFC 3986, section 6.2.2), and
/// what a path may not hold is encoded, a stray percent sign too. So nobody evades a rule by spelling a path otherwise.
/// Slashes and dots are left as they are: Envoy's `normalize_path` and `merge_slashes` are for them.
pub(super) fn normalize(path: &[u8]) -> String {
    let path = path.split(|byte| matches!(byte, b'?' | b'#')).next().unwrap_or_default();
    let mut normal = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        match (byte, tail) {
            (b'%', [high, low, behind @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                rest = behind;
                match crate::annotation::owner::decode(&[b'%', *high, *low]).first() {
                    Some(plain) if is_unreserved(*plain) => normal.push(char::from(*plain)),
                    Some(other) => encode(&mut normal, *other),
                    None => {}
                }
            }
            (byte, _) if is_unreserved(*byte) || b"/!$&'()*+,;=:@".contains(byte) => normal.push(char::from(*byte)),
            (byte, _) => encode(&mut normal, *byte),
        }
    }
    normal
}

/// Characters that mean the same with and without encoding (RFC 3986, section 2.3).
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn encode(text: &mut String, byte: u8) {
    text.push_str(&format!("%{byte:02X}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(text: &str) -> String {
        Pattern::parse(text).unwrap().route()
    }

    #[test]
    fn patterns_become_routes() {
        assert_eq!(route("/"), "/");
        assert_eq!(route("/orders/{id}/capture"), "/orders/{p0}/capture");
        assert_eq!(route("/a/{x}.png/{*tail}"), "/a/{p0}.png/{*rest}");
        assert_eq!(route("/a%2f%41/{{b}}/ü"), "/a%2FA/%7Bb%7D/%C3%BC");
        assert_eq!(Pattern::parse("/{a}/{b}").unwrap().captures, ["a", "b"]);
    }

    #[test]
    fn bad_patterns_say_the_fix() {
        for (text, part) in [
            ("orders", "does not begin"),
            ("", "does not begin"),
            ("/a?b=1", "has a \"?\""),
            ("/a#b", "has a \"#\""),
            ("/{a", "without its \"}\""),
            ("/a}", "without its \"{\""),
            ("/{}", "name it"),
            ("/{*}", "name it"),
            ("/{a b}", "name it"),
            ("/{a}{b}", "two captures"),
            ("/{a}-{b}", "two captures"),
            ("/{*a}/b", "whole last segment"),
            ("/x{*a}", "whole last segment"),
            ("/{*a}x", "whole last segment"),
            ("/{a}/{a}", "twice"),
            ("/{method}", "source of its own"),
            ("/100%", "write \"%25\""),
        ] {
            let problem = Pattern::parse(text).unwrap_err();
            assert!(problem.contains(part), "{text}: {problem}");
        }
        // Whatever the pattern has in it, the complaint is one line that is not much longer than it need be.
        for hostile in ["/{*a\nb}/c".to_owned(), format!("/{{*{}}}/c", "a".repeat(1000))] {
            let problem = Pattern::parse(&hostile).unwrap_err();
            assert!(problem.len() < 200 && !problem.contains(char::is_control), "{problem:?}");
        }
        assert!(Pattern::parse(&format!("/{}", "a".repeat(1024))).unwrap_err().contains("too long"));
        let many: String = (0..17).map(|n| format!("/{{c{n}}}")).collect();
        assert!(Pattern::parse(&many).unwrap_err().contains("captures"));
    }

    #[test]
    fn one_path_has_one_spelling() {
        assert_eq!(normalize(b"/orders/%34%32?x=%31#f"), "/orders/42");
        assert_eq!(normalize(b"/a%2fb/%e4"), "/a%2Fb/%E4");
        assert_eq!(normalize("/ü {x}".as_bytes()), "/%C3%BC%20%7Bx%7D");
        assert_eq!(normalize(b"/100%/%zz/%"), "/100%25/%25zz/%25");
        // A stray sign in front of an encoded digit must not become an encoding.
        assert_eq!(normalize(b"/%%341"), "/%2541");
        assert_eq!(normalize(b""), "");
    }

    #[test]
    fn normal_paths_stay() {
        for path in [&b"/%%341%2541?q"[..], b"/\xff\x00~-._!$&'()*+,;=:@[]|^`\"<>\\"] {
            let once = normalize(path);
            assert!(once.is_ascii());
            assert_eq!(normalize(once.as_bytes()), once);
        }
    }

    #[test]
    fn the_more_exact_comes_first() {
        let order = ["/a/b", "/a/{x}.tar.gz", "/a/{x}.gz", "/a/img-{x}", "/a/{x}", "/a/{*rest}", "/{x}/b"];
        let patterns: Vec<_> = order.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        assert!(patterns.is_sorted_by_key(Pattern::exactness));
    }
}
