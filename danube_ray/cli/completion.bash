# eval "$(danube --completion)" in ~/.bashrc; in ~/.zshrc after: autoload -U +X bashcompinit && bashcompinit
_danube() {
    local word=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]} words
    if ((COMP_CWORD == 1)); then
        words="@VERBS@"
    elif [[ " @PRESET_VERBS@ " == *" $verb "* ]] && ((COMP_CWORD == 2)); then
        words="@PRESETS@"
    elif [[ $word == -* ]]; then # what the verb's own help lists
        words=$(danube "$verb" "${COMP_WORDS[2]}" --help 2>/dev/null | grep -oE -- '--[a-z0-9][a-z0-9.-]*' | sort -u)
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -o default -F _danube danube
