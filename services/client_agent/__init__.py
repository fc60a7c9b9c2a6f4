"""The client agent: trains on a device's own data and takes part in encrypted averages.

`from services.client_agent import Agent, AgentConfig` is the Python interface; `shelora-agent` the command line.
"""

from services.client_agent.agent import Agent
from services.client_agent.config import AgentConfig

__all__ = ["Agent", "AgentConfig"]
