"""Programs that leave the process: exported graphs of static shapes."""

from toma_fx.export.programs import Exported, export_programs

__all__ = ["Exported", "export_programs"]
