from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    def run(self) -> None: ...
