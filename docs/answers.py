"""Answer the questions of docs/sql.md anew: `python docs/answers.py gradstore-demo/store`."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("sql.md")
ANSWERED = re.compile(r"(^```sql\n(.*?)^```\n\n```\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE)


def main(store: Path) -> None:
    """Run every query that has an answer under it, and put what it prints there."""

    def answer(found: re.Match[str]) -> str:
        command = [sys.executable, "-m", "gradstore", "sql", "-", "-s", str(store)]
        done = subprocess.run(
            command, input=found[2], stdout=subprocess.PIPE, text=True, check=True
        )
        lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
        return found[1] + "\n".join(line for line in lines if line) + "\n" + found[4]

    PAGE.write_text(ANSWERED.sub(answer, PAGE.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
