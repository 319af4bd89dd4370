//! What a document says to a shell: fenced blocks, and the commands in them.

/// A fenced block: its language, its lines, and where it begins.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) language: String,
    pub(crate) text: String,
    pub(super) line: usize,
    /// Nothing but blank lines lies between the block before and this one.
    pub(super) follows: bool,
}

pub(crate) fn blocks(document: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut inside = false;
    let mut follows = false;
    for (number, line) in document.lines().enumerate() {
        match line.strip_prefix("```") {
            Some(language) if !inside => {
                blocks.push(Block {
                    language: language.trim().to_owned(),
                    text: String::new(),
                    line: number + 1,
                    follows,
                });
                inside = true;
            }
            Some(_) => (inside, follows) = (false, true),
            None if inside => {
                let block = blocks.last_mut().expect("inside one");
                block.text += line;
                block.text.push('\n');
            }
            None => follows &= line.trim().is_empty(),
        }
    }
    assert!(!inside, "the last block has no end");
    blocks
}

/// The commands of a block: lines, joined where one ends in a backslash, without comments.
pub(crate) fn commands(block: &str) -> Vec<String> {
    let joined = block.replace("\\\n", " ");
    let without_comment = |line: &str| {
        let end = if line.starts_with('#') {
            Some(0)
        } else {
            line.find(" #")
        };
        let command = &line[..end.unwrap_or(line.len())];
        command.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let lines = joined.lines().map(without_comment);
    lines.filter(|line| !line.is_empty()).collect()
}

/// What a command starts, behind `sudo`, and its first argument.
pub(super) fn program(command: &str) -> (&str, &str) {
    let mut words = command.split(' ').skip_while(|word| *word == "sudo");
    (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    )
}

#[test]
fn blocks_and_commands_are_found() {
    let text = "text\n```sh\nsudo forwarder run \\\n    -p 1:2   # comment\n# all of it\n```\n\n```text\nready\n```\nword\n```text\n```\n";
    let found = blocks(text);
    let languages: Vec<(&str, bool)> = found
        .iter()
        .map(|block| (block.language.as_str(), block.follows))
        .collect();
    assert_eq!(languages, [("sh", false), ("text", true), ("text", false)]);
    assert_eq!(commands(&found[0].text), ["sudo forwarder run -p 1:2"]);
    assert_eq!(program("sudo forwarder run -p 1:2"), ("forwarder", "run"));
    assert_eq!(
        program("curl http://[::1]:80/"),
        ("curl", "http://[::1]:80/")
    );
}
