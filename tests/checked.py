"""The type checker that the tests put on every function and dataclass of the package (see conftest)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is asked for
