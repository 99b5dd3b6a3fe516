//! Rules: which requests they match, and in what order. How they are written in a policy must not live here.
//!
//! Precedence: of the rules for a request's method and those for any method, the ones with the most exact path come
//! first (as matchit has it: literal segments before captures, captures before a catch-all); rules of one path shape
//! are tried in their order; when the headers or the route of all of those say no, the next exact path has its turn;
//! rules without a path come last, in their order. The first rule that matches is the only one that acts.
//!
//! A trailing slash counts: `/a` and `/a/` are two paths.

use std::collections::{BTreeMap, BTreeSet};

use matchit::Router;

use super::path::{Pattern, normalize};
use super::reader::PolicyError;
use super::template::{FillError, Source, Template};
use super::{Enforcement, OnLeaseLost, OnUnavailable};
use crate::annotation::Wanted;

/// What a rule asks of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// It is there.
    Present,
    /// It has this value.
    Is(String),
}

/// One lock of a rule. What is unsaid is left to the policy's defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleLock {
    /// Its name.
    pub name: Template,
    /// The lock without its name: mode and times.
    pub(super) terms: RuleTerms,
}

/// The mode and the times of a rule's lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleTerms {
    pub(super) mode: Option<interlock_core::Mode>,
    pub(super) wait: Option<std::time::Duration>,
    pub(super) ttl: Option<std::time::Duration>,
    pub(super) hold: Option<std::time::Duration>,
}

/// A rule: which requests take which locks.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its name, for logs and metrics.
    pub name: String,
    /// What it locks.
    pub locks: Vec<RuleLock>,
    /// Whether it acts, for whom, only watches, or neither: its own word, else the policy's.
    pub enforcement: Enforcement,
    /// What becomes of a request whose lease is lost.
    pub on_lease_lost: OnLeaseLost,
    /// What becomes of a request when the backend does not answer: its own word, else the policy's.
    pub on_backend_unavailable: OnUnavailable,
    pub(super) methods: Option<BTreeSet<String>>,
    pub(super) path: Option<Pattern>,
    pub(super) headers: BTreeMap<String, Condition>,
    pub(super) route: Option<String>,
}

/// What is asked of a request, as far as it is needed: the closures are called for what a rule in question names.
#[derive(Clone, Copy)]
pub struct Lookup<'a> {
    /// The method; may be empty where [`Rules::needs_method`] is false.
    pub method: &'a [u8],
    /// The raw path with its query; may be empty where [`Rules::needs_path`] is false.
    pub path: &'a [u8],
    /// Reads a header by its lower-case name.
    pub header: &'a dyn Fn(&str) -> Option<Vec<u8>>,
    /// Reads the name of the route.
    pub route: &'a dyn Fn() -> Option<Vec<u8>>,
    /// Reads the caller's SPIFFE ID.
    pub principal: &'a dyn Fn() -> Option<Vec<u8>>,
}

/// The rule for a request.
#[derive(Clone, Debug)]
pub struct Match<'r> {
    /// The rule.
    pub rule: &'r Rule,
    captures: Vec<String>,
}

impl Match<'_> {
    /// The locks that the rule asks for, in its order.
    ///
    /// # Errors
    /// The first name that the request does not fill.
    pub fn locks(&self, lookup: &Lookup<'_>) -> Result<Vec<Wanted>, FillError> {
        let wanted = |lock: &RuleLock| {
            let RuleTerms { mode, wait, ttl, hold } = lock.terms;
            Ok(Wanted { name: lock.name.fill(&self.captures, lookup)?, mode, wait, ttl, hold })
        };
        self.rule.locks.iter().map(wanted).collect()
    }
}

/// Rules of one path shape.
#[derive(Clone, Debug)]
struct Shape {
    /// Matches this shape alone.
    router: Router<()>,
    rules: Vec<usize>,
}

/// The rules that can match requests of one method.
#[derive(Clone, Debug, Default)]
struct Table {
    /// Finds the first shape that matches, without trying them one by one. None where a segment has a suffix:
    /// matchit 0.9 does not come back from one when the rest of the path does not match, and overlooks other shapes.
    router: Option<Router<usize>>,
    /// All shapes, the most exact first.
    shapes: Vec<Shape>,
    /// Rules without a path.
    pathless: Vec<usize>,
}

/// All rules of a policy.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    /// One table for each method that a rule names, with the rules for any method in it.
    by_method: BTreeMap<String, Table>,
    /// The table for all other methods.
    other: Table,
    needs_path: bool,
}

impl Rules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The rules as written.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter()
    }

    /// Whether [`Rules::find`] and [`Match::locks`] look at the path.
    pub fn needs_path(&self) -> bool {
        self.needs_path
    }

    /// Whether [`Rules::find`] and [`Match::locks`] look at the method.
    pub fn needs_method(&self) -> bool {
        !self.by_method.is_empty() || self.has_source(|source| matches!(source, Source::Method))
    }

    /// Whether a rule asks for the route's name.
    pub fn needs_route(&self) -> bool {
        self.rules.iter().any(|rule| rule.route.is_some())
    }

    fn has_source(&self, wanted: fn(&Source) -> bool) -> bool {
        self.rules.iter().flat_map(|rule| &rule.locks).flat_map(|lock| lock.name.sources()).any(wanted)
    }

    /// The rule for a request; see the head of this module for which that is.
    pub fn find(&self, lookup: &Lookup<'_>) -> Option<Match<'_>> {
        let method = std::str::from_utf8(lookup.method).unwrap_or_default();
        let table = self.by_method.get(method).unwrap_or(&self.other);
        let mut facts = Facts { lookup, headers: Vec::new(), route: None };
        if !table.shapes.is_empty() {
            let path = normalize(lookup.path);
            // No shape before the one that the router finds matches the path.
            let first = table.router.as_ref().map_or(0, |router| router.at(&path).map_or(usize::MAX, |hit| *hit.value));
            for shape in table.shapes.iter().skip(first) {
                if let Ok(hit) = shape.router.at(&path)
                    && let Some(rule) = self.first(&shape.rules, &mut facts)
                {
                    let captures = hit.params.iter().map(|(_, value)| value.to_owned()).collect();
                    return Some(Match { rule, captures });
                }
            }
        }
        self.first(&table.pathless, &mut facts).map(|rule| Match { rule, captures: Vec::new() })
    }

    fn first(&self, rules: &[usize], facts: &mut Facts<'_, '_>) -> Option<&Rule> {
        rules.iter().filter_map(|index| self.rules.get(*index)).find(|rule| facts.satisfy(rule))
    }

    /// Puts rules in order.
    ///
    /// # Errors
    /// A path that is ambiguous beside an earlier one; a rule that no request can reach.
    pub(super) fn build(rules: Vec<Rule>) -> Result<Rules, PolicyError> {
        refuse_unreachable(&rules)?;
        let methods: BTreeSet<&String> = rules.iter().flat_map(|rule| rule.methods.iter().flatten()).collect();
        let table = |method: Option<&String>| {
            let applies = |rule: &Rule| match (&rule.methods, method) {
                (None, _) => true,
                (Some(methods), Some(method)) => methods.contains(method),
                (Some(_), None) => false,
            };
            Table::build(&rules, applies)
        };
        let other = table(None)?;
        let by_method = methods
            .iter()
            .map(|method| Ok(((*method).clone(), table(Some(method))?)))
            .collect::<Result<_, PolicyError>>()?;
        let mut built = Rules { by_method, other, needs_path: false, rules };
        built.needs_path = built.rules.iter().any(|rule| rule.path.is_some())
            || built.has_source(|source| matches!(source, Source::Query(_)));
        Ok(built)
    }
}

impl Table {
    fn build(rules: &[Rule], applies: impl Fn(&Rule) -> bool) -> Result<Table, PolicyError> {
        let mut table = Table::default();
        let mut shapes: Vec<(&Pattern, Vec<usize>)> = Vec::new();
        for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| applies(rule)) {
            match &rule.path {
                None => table.pathless.push(index),
                Some(pattern) => match shapes.iter_mut().find(|(shape, _)| shape.segments == pattern.segments) {
                    Some((_, same)) => same.push(index),
                    None => shapes.push((pattern, vec![index])),
                },
            }
        }
        let routes: Vec<_> = shapes.iter().map(|(pattern, same)| (pattern.route(), same.first().copied())).collect();
        refuse_ambiguous(rules, &routes)?;
        let mut order: Vec<usize> = (0..shapes.len()).collect();
        order.sort_by_key(|written| shapes.get(*written).map(|(pattern, _)| pattern.exactness()));
        if !shapes.iter().any(|(pattern, _)| pattern.has_suffix()) {
            let mut router = Router::new();
            // Whether matchit takes a route can hang on the order they come in: the one that was just tried.
            for (written, (route, rule)) in routes.iter().enumerate() {
                let cannot = |error| PolicyError::new(place(*rule), format!("is no path: {error}"));
                let exact = order.iter().position(|index| *index == written).unwrap_or_default();
                router.insert(route, exact).map_err(cannot)?;
            }
            table.router = Some(router);
        }
        for written in order {
            if let (Some((route, rule)), Some((_, same))) = (routes.get(written), shapes.get(written)) {
                let cannot = |error| PolicyError::new(place(*rule), format!("is no path: {error}"));
                let mut router = Router::new();
                router.insert(route, ()).map_err(cannot)?;
                table.shapes.push(Shape { router, rules: same.clone() });
            }
        }
        Ok(table)
    }
}

fn refuse_ambiguous(rules: &[Rule], routes: &[(String, Option<usize>)]) -> Result<(), PolicyError> {
    let mut all = Router::new();
    for (position, (route, rule)) in routes.iter().enumerate() {
        if all.insert(route, ()).is_ok() {
            continue;
        }
        let conflicts = |(earlier, _): &&(String, Option<usize>)| {
            let mut pair = Router::new();
            pair.insert(earlier, ()).is_ok() && pair.insert(route, ()).is_err()
        };
        let with = routes.iter().take(position).find(conflicts).and_then(|(_, rule)| *rule);
        let named = |index: usize| match rules.get(index) {
            Some(rule) => format!("that of rules[{index}] ({})", rule.name),
            None => "those of earlier rules".to_owned(),
        };
        let beside = with.map_or_else(|| "those of earlier rules".to_owned(), named);
        let problem = format!("is ambiguous beside {beside}; make one of them more exact, or give both one shape");
        return Err(PolicyError::new(place(*rule), problem));
    }
    Ok(())
}

fn place(rule: Option<usize>) -> String {
    format!("rules[{}].match.path", rule.unwrap_or_default())
}

/// Refuses a rule whose every request an earlier rule takes first.
fn refuse_unreachable(rules: &[Rule]) -> Result<(), PolicyError> {
    for (index, rule) in rules.iter().enumerate() {
        let earlier = || rules.iter().enumerate().take(index).filter(|(_, earlier)| earlier.takes_all_that(rule));
        let taken_by = match &rule.methods {
            None => earlier().find(|(_, earlier)| earlier.methods.is_none()),
            Some(methods) => {
                let takers = methods.iter().map(|method| {
                    let of_method = |taker: &Rule| taker.methods.as_ref().is_none_or(|all| all.contains(method));
                    earlier().find(|(_, taker)| of_method(taker))
                });
                takers.collect::<Option<Vec<_>>>().and_then(|takers| takers.into_iter().next())
            }
        };
        if let Some((earlier, taker)) = taken_by {
            return Err(PolicyError::new(
                format!("rules[{index}].match"),
                format!(
                    "no request reaches this rule, because rules[{earlier}] ({}) takes all that it matches; put it \
                     before that rule, or take it out",
                    taker.name
                ),
            ));
        }
    }
    Ok(())
}

impl Rule {
    /// Whether, methods aside, this rule matches every request that `other` matches and is asked at the same point.
    fn takes_all_that(&self, other: &Rule) -> bool {
        let shape = |rule: &Rule| rule.path.as_ref().map(|pattern| pattern.segments.clone());
        let implied = |(name, condition): (&String, &Condition)| {
            other.headers.get(name).is_some_and(|theirs| *condition == Condition::Present || condition == theirs)
        };
        shape(self) == shape(other)
            && (self.route.is_none() || self.route == other.route)
            && self.headers.iter().all(implied)
    }
}

/// What has been read of a request so far: each thing is read once, and only when a rule in question names it.
struct Facts<'l, 'a> {
    lookup: &'l Lookup<'a>,
    headers: Vec<(String, Option<Vec<u8>>)>,
    route: Option<Option<Vec<u8>>>,
}

impl Facts<'_, '_> {
    fn satisfy(&mut self, rule: &Rule) -> bool {
        let headers = rule.headers.iter().all(|(name, condition)| match (condition, self.header(name)) {
            (_, None) => false,
            (Condition::Present, Some(_)) => true,
            (Condition::Is(wanted), Some(value)) => value == wanted.as_bytes(),
        });
        headers && rule.route.as_ref().is_none_or(|route| self.route() == Some(route.as_bytes()))
    }

    fn header(&mut self, name: &str) -> Option<&[u8]> {
        if !self.headers.iter().any(|(read, _)| read == name) {
            self.headers.push((name.to_owned(), (self.lookup.header)(name)));
        }
        self.headers.iter().find(|(read, _)| read == name).and_then(|(_, value)| value.as_deref())
    }

    fn route(&mut self) -> Option<&[u8]> {
        self.route.get_or_insert_with(self.lookup.route).as_deref()
    }
}
