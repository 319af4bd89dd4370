//! What is wrong with a command line, in one line.

/// Of the library's several lines: what is wrong, what it belongs to, a tip, and where to read on.
pub fn line(text: &str) -> String {
    let ends = |line: &&str| {
        ["Usage: ", "For more information"]
            .iter()
            .any(|begin| line.starts_with(begin))
    };
    let parts = text.lines().map(str::trim).take_while(|line| !ends(line));
    let mut line = String::new();
    for part in parts.filter(|part| !part.is_empty()) {
        let is_continued = line.is_empty() || line.ends_with(':') || part.starts_with('[');
        line.push_str(match (line.is_empty(), is_continued) {
            (true, _) => "",
            (_, true) => " ",
            _ => "; ",
        });
        line.push_str(part);
    }
    line + "; `forwarder help` and `forwarder help COMMAND` say what there is"
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (words, part) in [
            ("bogus", "'bogus'; `forwarder help`"),
            ("run --xdp slow", "[possible values: auto, native"),
            ("list --jso", "; tip: a similar argument exists: '--json'"),
            ("publish", "were not provided: <SPEC>..."),
            (
                "unpublish 1 --drain --reset",
                "cannot be used with '--reset'",
            ),
            ("run -p 80", "'--publish <SPEC>': expected [HOST_ADDR:]"),
            ("trace x", "\"x\" is no publish's number"),
            ("run --metrics x", "such as 127.0.0.1:9100"),
            ("run --log slow", "\"slow\" is no level"),
            ("run --log a=b=c", "\"a=b=c\" is no level"),
            ("publish 80:10.0.0.2:80 --max-flows 0", "no number of flows"),
        ] {
            let words = std::iter::once("forwarder").chain(words.split(' '));
            let error = Cli::try_parse_from(words).expect_err("wrong usage");
            let line = line(&error.to_string());
            assert!(
                line.starts_with("error: ") && !line.contains('\n'),
                "{line}"
            );
            assert!(line.contains(part), "{line}");
        }
    }
}
