"""Follows JSON text character by character: how deep it stands, and whether a number runs on."""

_BLANKS = " \t\n\r"
_ESCAPED_BLANKS = "nrt"


class JsonScanner:
    r"""Where in a JSON text its last character stands. It does not check that the text is JSON.

    Attributes:
        depth: objects and lists that are open.
        in_string: whether a string is open.
        num_digits: digits in a row, outside strings, up to the last character.
        num_blanks: blanks in a row; in strings those that are written as `\n`, too.
        in_exponent: whether these digits are an exponent's.
    """

    __slots__ = ("_escapes", "depth", "in_exponent", "in_string", "num_blanks", "num_digits")

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.num_digits = 0
        self.num_blanks = 0
        self.in_exponent = False
        self._escapes = False  # whether the last character was a backslash that escapes the next

    def add(self, character: str) -> None:
        """Go on by a character."""
        escaped, self._escapes = self._escapes, False
        if self.in_string:
            self._escapes = character == "\\" and not escaped
            is_blank = character in _ESCAPED_BLANKS if escaped else character in _BLANKS
            if not self._escapes:  # of a blank that is written in two
                self.num_blanks = self.num_blanks + 1 if is_blank else 0
            self.in_string = character != '"' or escaped
            return
        self.num_blanks = self.num_blanks + 1 if character in _BLANKS else 0
        is_digit = character.isascii() and character.isdigit()
        self.in_exponent = character in "eE" or (
            self.in_exponent and (is_digit or character in "+-")
        )
        self.num_digits = self.num_digits + 1 if is_digit else 0
        if character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
