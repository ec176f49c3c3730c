"""Writes ``docs/acl/sutra.acl`` from the rights in ``sutra_tasks/rights.py``: ``python docs/acl.py``."""

from pathlib import Path

from sutra_tasks.rights import ROLES, rights_of

FILE = Path(__file__).parent / "acl" / "sutra.acl"


def render() -> str:
    """Return the ACL file: a user a line, whom nobody can be until a password is set."""
    return "".join(
        f"user sutra-{role} off resetpass {' '.join(rights_of(role).rules)}\n" for role in ROLES
    )


if __name__ == "__main__":
    FILE.write_text(render())
