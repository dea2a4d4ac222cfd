from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    def run(self) -> None: ...
