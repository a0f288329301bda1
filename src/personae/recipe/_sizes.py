"""Sizes as people write them."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(text: str, *, percent: bool = False) -> float | int:
    """Read '1%' as the fraction 0.01 (float) and '900KB', '1.5GiB' as bytes (int).

    Raises:
        ValueError: if the text is neither, or not above zero.
    """
    plain = text.strip().replace(" ", "").replace("_", "")
    number = plain.rstrip("%ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    unit = plain[len(number) :]
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if value > 0 and unit == "%" and percent:
        return value / 100
    if unit.upper() in _UNITS and value * _UNITS[unit.upper()] >= 1:
        return int(value * _UNITS[unit.upper()])
    kinds = "'1%', '900KB' or '1.5MiB'" if percent else "'900MB' or '2GiB'"
    raise ValueError(f"'{text}' is no size of a byte or more. Write {kinds}.")
