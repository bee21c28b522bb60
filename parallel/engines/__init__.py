"""Engines behind `parallel.engine.Engine`. What their packages say at import of others that are absent is not shown."""

import logging
import warnings

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).* not installed")
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
