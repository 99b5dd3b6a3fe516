//! The ways in which a request can be bad, each as a maker of such requests. What has to come of them is judged in
//! [`super::judge`]; the makers only say where the outcome is certain.

use super::dice::Dice;
use super::shot::{Expect, Shot};
use super::{forged, framing, values};

/// What is known of the proxy before the first shot.
pub struct Known {
    /// A `lock-fence` that was signed for [`Known::owner`].
    pub signed: Vec<u8>,
    /// Whose it is.
    pub owner: u128,
}

/// A kind of bad request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Every byte, in every header that the filter reads.
    Bytes,
    /// Broken UTF-8.
    Unicode,
    /// NUL, CR, LF, folded lines.
    Lines,
    /// Headers up to their limits and past them.
    Sizes,
    /// Many members, fields, parameters, locks.
    Counts,
    /// What is nearly a List.
    Structure,
    /// Numbers that are none, or too large.
    Numbers,
    /// Doubled parameters, empty members.
    Doubles,
    /// The filter's own headers in other spellings.
    Spellings,
    /// Fences that were never given, or to others.
    Fences,
    /// What only the filter may say of a lock.
    Status,
    /// The same in trailers.
    Trailers,
    /// Lengths that contradict each other, and what hides behind them.
    Framing,
    /// Headers that name headers.
    HopByHop,
    /// Owners that are none.
    Owners,
    /// Time that the caller says it has.
    Timeouts,
    /// Paths that are spelled to slip by.
    Paths,
    /// Queries that a lock's name is made from.
    Queries,
    /// Bad calls of gRPC.
    Grpc,
    /// HTTP/2's own headers.
    Pseudo,
    /// A good request with broken bytes.
    Soup,
}

impl Class {
    pub const ALL: [Class; 21] = [
        Class::Bytes,
        Class::Unicode,
        Class::Lines,
        Class::Sizes,
        Class::Counts,
        Class::Structure,
        Class::Numbers,
        Class::Doubles,
        Class::Spellings,
        Class::Fences,
        Class::Status,
        Class::Trailers,
        Class::Framing,
        Class::HopByHop,
        Class::Owners,
        Class::Timeouts,
        Class::Paths,
        Class::Queries,
        Class::Grpc,
        Class::Pseudo,
        Class::Soup,
    ];
}

/// The listeners. Those that read the header come more often.
const LANES: [&str; 10] = ["accept", "accept", "accept", "roomy", "roomy", "roomy", "pass", "strip", "off", "audit"];

/// The shot of this number.
pub fn shot(seed: u64, number: usize, known: &Known) -> Shot {
    let mut dice = Dice::new(seed, number);
    let class = Class::ALL[number % Class::ALL.len()];
    let lane = dice.pick(&LANES);
    let owner = 1000 + u128::try_from(dice.below(40)).unwrap();
    let mut shot = Shot::new(number, class, lane, owner);
    shot.h2 = match class {
        Class::Pseudo => true,
        Class::Framing | Class::Soup => false,
        _ => dice.chance(50),
    };
    // Sometimes beside a lock that is in order, so that there is something to lose.
    let beside = dice.chance(60);
    fill(&mut shot, number / Class::ALL.len(), &mut dice, known);
    let asks = shot.fields.iter().any(|(name, _)| name.eq_ignore_ascii_case(b"lock"));
    if beside && !asks && shot.raw.is_none() {
        shot.with("lock", format!("order/{};wait=0.05", dice.below(1000)));
    }
    if shot.h2 && (class != Class::Spellings || dice.chance(70)) {
        shot.fields.iter_mut().for_each(|(name, _)| name.make_ascii_lowercase());
    }
    if shot.h2 && !shot.path.is_ascii() {
        // No upstream takes such a path over HTTP/2, and would break the connection off that others use: Envoy answers.
        shot.path = [b"/answered/", shot.path.strip_prefix(b"/filled/").unwrap_or(&shot.path[1..])].concat();
    }
    if matches!(class, Class::Fences | Class::Status) && !beside {
        shot.expect = Expect::Served;
    }
    // Only there is every header read, and everything that is in order served: but for what others hold meanwhile.
    if !matches!(lane, "accept" | "roomy") {
        shot.expect = Expect::Order;
    }
    shot
}

fn fill(shot: &mut Shot, round: usize, dice: &mut Dice, known: &Known) {
    match shot.class {
        Class::Bytes => values::bytes(shot, round, dice),
        Class::Unicode => values::unicode(shot, dice),
        Class::Lines => framing::lines(shot, dice),
        Class::Sizes => values::sizes(shot, dice),
        Class::Counts => values::counts(shot, dice),
        Class::Structure => shot.with("lock", values::structure(dice)),
        Class::Numbers => values::numbers(shot, dice),
        Class::Doubles => values::doubles(shot, dice),
        Class::Spellings => forged::spellings(shot, dice),
        Class::Fences => forged::fences(shot, dice, known),
        Class::Status => forged::status(shot, dice),
        Class::Trailers => forged::trailers(shot, dice),
        Class::Framing => framing::lengths(shot, dice),
        Class::HopByHop => framing::hop_by_hop(shot, dice),
        Class::Owners => values::owners(shot, dice),
        Class::Timeouts => values::timeouts(shot, dice),
        Class::Paths => values::paths(shot, dice),
        Class::Queries => values::queries(shot, dice),
        Class::Grpc => {
            shot.method = b"POST".to_vec();
            shot.body = vec![0; 5];
            shot.with(
                "content-type",
                dice.pick(&["application/grpc", "application/grpc+x", "application/grpc;", "application/grpc\u{e9}"]),
            );
            shot.with("te", "trailers");
            shot.with("lock", values::structure(dice));
            values::timeouts(shot, dice);
        }
        Class::Pseudo => framing::pseudo(shot, dice),
        Class::Soup => framing::soup(shot, dice),
    }
}
