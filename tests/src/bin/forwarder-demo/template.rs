//! Filling a page: each `{{name}}` becomes the value of that name. Text is escaped; only what was made here is HTML.

use std::collections::BTreeMap;

/// What stands for a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Text(String),
    Html(String),
}

pub(crate) type Values = BTreeMap<&'static str, Value>;

/// Fills `template`. A name that has no value stays as it is, which a test would see.
pub(crate) fn fill(template: &str, values: &Values) -> String {
    let mut filled = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, next)) = after.split_once("}}") else {
            break;
        };
        filled += before;
        match values.get(name) {
            Some(Value::Text(text)) => filled += &escaped(text),
            Some(Value::Html(html)) => filled += html,
            None => filled += &format!("{{{{{name}}}}}"),
        }
        rest = next;
    }
    filled + rest
}

/// `text` as it may stand between tags and in quoted attributes.
pub(crate) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_html_is_not() {
        let values = Values::from([
            ("text", Value::Text("<b a='\"&".into())),
            ("html", Value::Html("<b>".into())),
        ]);
        let filled = fill("{{text}} {{html}} {{other}} {{", &values);
        assert_eq!(filled, "&lt;b a=&#39;&quot;&amp; <b> {{other}} {{");
    }

    #[test]
    fn a_value_is_not_filled_again() {
        let values = Values::from([
            ("a", Value::Text("{{b}}".into())),
            ("b", Value::Text("!".into())),
        ]);
        assert_eq!(fill("{{a}}", &values), "{{b}}");
    }
}
