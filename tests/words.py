"""The command line for tests that change some options of a list of words."""

from bilevel_lite import __main__


def main(words: list[str]) -> int:
    """Run it with the last of an option's occurrences: given twice, it would be refused."""
    first = next((k for k, word in enumerate(words) if word.startswith("--")), len(words))
    options: dict[str, list[str]] = {}
    for word in words[first:]:
        if word.startswith("--"):
            options.pop(word, None)
            options[name := word] = [word]
        else:
            options[name].append(word)
    return __main__.main([*words[:first], *(word for own in options.values() for word in own)])
