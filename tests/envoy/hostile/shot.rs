//! A bad request as a value: what it is made of, and how it is put on the wire. What is bad about it comes from
//! [`super::classes`].

use interlock_testkit::client::traceparent;

use super::classes::Class;

pub type Field = (Vec<u8>, Vec<u8>);

/// What is known of the answer beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// An answer that is in order, or a closed connection.
    Order,
    /// 200, from the upstream.
    Served,
    /// The filter's refusal for this reason.
    Refused(&'static str),
}

/// One request.
#[derive(Clone, Debug)]
pub struct Shot {
    /// Its number in the run.
    pub number: usize,
    /// What is bad about it.
    pub class: Class,
    /// The listener that it goes to.
    pub lane: &'static str,
    /// Whether it goes over HTTP/2.
    pub h2: bool,
    pub method: Vec<u8>,
    pub path: Vec<u8>,
    /// Who sends it; none where its class says so in fields of its own.
    pub owner: Option<u128>,
    pub fields: Vec<Field>,
    pub body: Vec<u8>,
    pub trailers: Vec<Field>,
    /// Over HTTP/1.1: all bytes, in place of what the above would make.
    pub raw: Option<Vec<u8>>,
    /// Over HTTP/2: pseudo headers in place of the usual ones.
    pub pseudo: Option<Vec<Field>>,
    pub expect: Expect,
    /// Whether the other side may rightly wait for more of it.
    pub open_ended: bool,
}

/// A field.
pub fn field(name: &str, value: impl AsRef<[u8]>) -> Field {
    (name.as_bytes().to_vec(), value.as_ref().to_vec())
}

impl Shot {
    /// A good request.
    pub fn new(number: usize, class: Class, lane: &'static str, owner: u128) -> Self {
        Shot {
            number,
            class,
            lane,
            h2: false,
            method: b"GET".to_vec(),
            path: b"/plain".to_vec(),
            owner: Some(owner),
            fields: Vec::new(),
            body: Vec::new(),
            trailers: Vec::new(),
            raw: None,
            pseudo: None,
            expect: Expect::Order,
            open_ended: false,
        }
    }

    /// Adds a field.
    pub fn with(&mut self, name: &str, value: impl AsRef<[u8]>) {
        self.fields.push(field(name, value));
    }

    fn all_fields(&self) -> Vec<Field> {
        let mut all = vec![field("x-shot", self.number.to_string())];
        all.extend(self.owner.map(|owner| field("traceparent", traceparent(owner))));
        all.extend(self.fields.iter().cloned());
        all
    }

    /// The bytes over HTTP/1.1.
    pub fn h1(&self) -> Vec<u8> {
        if let Some(raw) = &self.raw {
            return raw.clone();
        }
        let mut bytes = [&self.method[..], b" ", &self.path, b" HTTP/1.1\r\nhost: test\r\n"].concat();
        let line = |bytes: &mut Vec<u8>, (name, value): &Field| {
            bytes.extend([&name[..], b": ", value, b"\r\n"].concat());
        };
        self.all_fields().iter().for_each(|field| line(&mut bytes, field));
        let chunked = !self.body.is_empty() || !self.trailers.is_empty();
        if chunked {
            bytes.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
            if !self.body.is_empty() {
                bytes.extend_from_slice(format!("{:x}\r\n", self.body.len()).as_bytes());
                bytes.extend_from_slice(&self.body);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n");
            self.trailers.iter().for_each(|field| line(&mut bytes, field));
        }
        bytes.extend_from_slice(b"\r\n");
        bytes
    }

    /// The headers over HTTP/2.
    pub fn h2(&self) -> Vec<Field> {
        let usual = || {
            vec![
                field(":method", &self.method),
                field(":scheme", "http"),
                field(":authority", "test"),
                field(":path", &self.path),
            ]
        };
        let mut all = self.pseudo.clone().unwrap_or_else(usual);
        all.extend(self.all_fields());
        all
    }

    /// For people: what it was.
    pub fn shown(&self) -> String {
        let bytes = if self.h2 {
            self.h2().iter().flat_map(|(name, value)| [&name[..], b": ", value, b"\n"].concat()).collect()
        } else {
            self.h1()
        };
        let text: String = bytes.escape_ascii().to_string().chars().take(1500).collect();
        let codec = if self.h2 { "HTTP/2" } else { "HTTP/1.1" };
        format!("shot {} ({:?}, {codec}, to {}): {text}", self.number, self.class, self.lane)
    }
}
