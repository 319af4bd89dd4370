//! What a document shows as output, beside what a command has printed.

use serde_json::Value;

use super::block::Block;

/// What a block shows, beside what was printed.
pub(super) fn fits(shown: &Block, printed: &str) -> Result<(), String> {
    if shown.language == "json" {
        let parsed = |what: &str, text: &str| {
            let value = serde_json::from_str::<Value>(text);
            value.map_err(|error| format!("{what}: {error}: {text}"))
        };
        let (shown, real) = (parsed("shown", &shown.text)?, parsed("printed", printed)?);
        return has_shape(&shown, &real).map_err(|why| format!("{why}\n{printed}"));
    }
    match first_unlike(&shown.text, printed) {
        None => Ok(()),
        Some(line) => Err(format!("no line like {line:?} was printed:\n{printed}")),
    }
}

/// The first line that is shown and has none like it in what was printed, in the same order. A number may be another
/// number, and `...` stands for anything.
pub(super) fn first_unlike<'a>(shown: &'a str, printed: &str) -> Option<&'a str> {
    let mut rest = printed.lines();
    shown
        .lines()
        .filter(|line| !line.trim().is_empty())
        .find(|line| !rest.any(|printed| is_like(line, printed)))
}

pub(super) fn is_like(shown: &str, printed: &str) -> bool {
    fn words_are_like(shown: &[&str], printed: &[&str]) -> bool {
        match (shown, printed) {
            ([], []) => true,
            (["...", rest @ ..], _) => {
                (0..=printed.len()).any(|skipped| words_are_like(rest, &printed[skipped..]))
            }
            ([one, rest @ ..], [other, others @ ..]) => {
                let is_number = |word: &str| word.parse::<u64>().is_ok();
                (one == other || is_number(one) && is_number(other)) && words_are_like(rest, others)
            }
            _ => false,
        }
    }
    let shown: Vec<&str> = shown.split_whitespace().collect();
    let printed: Vec<&str> = printed.split_whitespace().collect();
    words_are_like(&shown, &printed)
}

/// Whether a JSON document has the fields that are shown, no more and no less, with values of the same types. `null`
/// may stand for anything on either side; each element that is shown has one like it.
pub(super) fn has_shape(shown: &Value, real: &Value) -> Result<(), String> {
    match (shown, real) {
        (Value::Null, _) | (_, Value::Null) => Ok(()),
        (Value::Object(shown), Value::Object(real)) => {
            let names = |object: &serde_json::Map<String, Value>| {
                let mut names: Vec<String> = object.keys().cloned().collect();
                names.sort();
                names
            };
            if names(shown) != names(real) {
                return Err(format!("fields {:?}, not {:?}", names(real), names(shown)));
            }
            shown
                .iter()
                .try_for_each(|(name, value)| has_shape(value, &real[name]))
        }
        (Value::Array(shown), Value::Array(real)) => shown.iter().try_for_each(|one| {
            let mut why = "an empty array".to_owned();
            let found = real.iter().any(|other| match has_shape(one, other) {
                Ok(()) => true,
                Err(error) => {
                    why = error;
                    false
                }
            });
            if found { Ok(()) } else { Err(why) }
        }),
        (Value::String(_), Value::String(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Bool(_), Value::Bool(_)) => Ok(()),
        _ => Err(format!("{real} has another type than {shown}")),
    }
}

#[test]
fn what_is_shown_is_compared() {
    let printed = "ID  FRONTEND\n7   *:8080/tcp  ebpf (peer)\n";
    assert_eq!(
        first_unlike("ID FRONTEND\n1 *:8080/tcp ...\n", printed),
        None
    );
    let wrong = "1 *:8081/tcp ...";
    assert_eq!(first_unlike(wrong, printed), Some(wrong));
    assert_eq!(first_unlike("1 *:8080/tcp", printed), Some("1 *:8080/tcp"));
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let real = json(r#"[{"id": 1, "reason": null}, {"id": 2, "reason": "x"}]"#);
    assert_eq!(
        has_shape(&json(r#"[{"id": 9, "reason": "y"}]"#), &real),
        Ok(())
    );
    for other in [
        r#"[{"id": 9}]"#,
        r#"[{"id": 9, "reason": "y", "more": 1}]"#,
        r#"[{"id": "9", "reason": "y"}]"#,
        "{}",
    ] {
        has_shape(&json(other), &real).unwrap_err();
    }
}
