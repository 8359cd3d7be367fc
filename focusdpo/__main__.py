from focusdpo.commands.cli import main

main()
