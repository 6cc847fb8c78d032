"""How much of a text is source code, markup or machine output: the reports leave coding data out of the mixture.

Line by line, by forms that programs share and prose does not. Made on real files of a dozen languages, and on papers,
novels, articles and web pages, of which it must not take any.
"""

from __future__ import annotations

import re

# A stripped line of code. Formulas between dollar signs are not code, and what lies on a long line proves little.
CODE_LINE = re.compile(
    r"""(?x)
    [\]{})(]+[;,]?$  # brackets alone
    |(?!.*\$.*\$)(?=.{1,160}$).*(?:\{|[)\]}"'];|\)\),|\}\)*,?|\*/|=>|[\w)\]]\)[ ]?:)$  # ends a statement, opens a block
    |(?:def|class)[ ]\w+.*:$
    |(?:if|elif|for|while|with|except|try|else|finally)\b.{0,120}:$
    |(?:import|from)[ ][\w.]+(?:[ ]import\b.*|[ ]as\b.*|;?)$
    |(?:return|raise|yield|assert|throw|print|del|await)(?:[ ][\w.]+|[ ]?[(\[{"'].{0,120}|[ ].{0,120}[)\]}'";])$
    |[\w.\[\]'"$*&<>:-]{1,60}(?:[ ][\w.\[\]*&<>:-]+){0,2}[ ]?(?:[-+*/|&^%.:?]?=)[ ]?[^=\s>].{0,150}$  # assigns
    |(?:\w|::|->|\.){1,80}\(.{0,150}\)[ ]*[;{:,]?$  # calls
    |(?://|/\*|\*/|\#!|\#[ ]*(?:include|define|undef|if|ifdef|ifndef|else|endif|pragma|error)\b|<!--|-->)
    |@\w[\w.]*(?:\(.*)?$  # decorates
    |<(?:[!?/]\w[^<>]*|html|head|body|main|div|[uo]l|li|p|table|t[rdh]|span|script|style|pre)>$
    |<[A-Za-z][^<>]*(?:="|>.*</).*$|.*</[a-z]\w*>$|[\w:-]+="[^"]*"[ ]?/?>?$  # markup
    |"[^"]*"[ ]?:
    |(?:fi|done|esac|then|do|else|end|begin|endif|break|continue);?$
    |.*;[ ]?(?:do|then)$|(?:export|local|readonly|alias)[ ]\w+=
    |[a-z][a-z0-9._-]*(?:[ ][\w./-]+)?[ ]--?[a-z]\S*(?:[ ].{0,120})?$
    |(?:cd|echo|mkdir|rm|cp|mv)[ ]["$/~.-]\S*$  # commands
    |(?:SELECT|INSERT[ ]INTO|CREATE[ ](?:TABLE|INDEX|VIEW)|UPDATE[ ]\w+[ ]SET|DELETE[ ]FROM|(?:ALTER|DROP)[ ]TABLE)\b
    |\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d.*\b(?:TRACE|DEBUG|INFO|WARN|WARNING|ERROR|FATAL)\b  # logs
    |at[ ][\w$.<>]+\(.*\)$|File[ ]".*",[ ]line[ ]\d+
    |[a-z-]+:[^;]{1,80};$  # styles
    |(?:static|const|extern|unsigned|signed|struct|union|enum|typedef|inline|public|private|protected|virtual|template
        |namespace|using|var|let|function|int|long|void|char|float|double|bool|auto|my|our|local|sub|use|package)\b
        .{0,150}[;({=)]$  # declares
    |(?!.*\$.*\$)(?=.{1,120}$).*(?:&&|\|\||(?<!=)==(?!=)|!=|::|->|\$\{|\$\(|\+\+|<<|>>)
    |(?:.*?(?:\)\{(?!\{)|\};|":|</[a-z]|\(\)|="|=')){4}  # a program without line breaks
    """
)
# Most lines of prose show at once that no form above is theirs: no symbol of code, and no word that begins a form.
COMMANDS = (
    "import|from|return|raise|yield|assert|throw|print|del|await|fi|done|esac|then|do|else|end|begin|endif|break|continue"
    "|cd|echo|mkdir|rm|cp|mv|SELECT|INSERT|CREATE|UPDATE|DELETE|ALTER|DROP|File"
)
PROSE_LINE = re.compile(rf"(?!(?:{COMMANDS})\b)[\w ,.!?'\"\u2019\u201c\u201d\u2014-]*")
# Comments, and lines set in: code where they follow code, up to some lines.
CONTINUED = ("#", "*", "--", ";", "%", " ", "\t")
MAX_CONTINUED_LINES = 8


def code_share(text: str) -> float:
    """The share of a text's lines that look like code, of those that are not blank; 0 for an empty text."""
    lines = code = 0
    since_code = MAX_CONTINUED_LINES
    for line in text.splitlines():
        if stripped := line.strip():
            lines += 1
            if _is_code(stripped):
                since_code = 0
            elif line.startswith(CONTINUED):
                since_code += 1
            else:
                since_code = MAX_CONTINUED_LINES
            code += since_code < MAX_CONTINUED_LINES
    return code / lines if lines else 0.0


def _is_code(line: str) -> bool:
    is_prose = " -" not in line and PROSE_LINE.fullmatch(line) is not None  # a dash may begin a command's option
    return not is_prose and CODE_LINE.match(line) is not None
