"""Programs that leave the process: exported graphs of static shapes."""

from toma_fx.export.programs import Exported, Programs, export_programs

__all__ = ["Exported", "Programs", "export_programs"]
