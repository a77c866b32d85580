from demo.corpora import main
from runtime import cli

cli.run(main, if_stopped="nothing was kept; run the same command again")
