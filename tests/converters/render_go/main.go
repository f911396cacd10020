// Renders Go templates as Ollama does: JSON in {"Template", "Data"} lines, JSON strings out.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }
type request struct {
	Template string
	Data     struct {
		System   string
		Messages []message
	}
}

func main() {
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for in.More() {
		var asked request
		if err := in.Decode(&asked); err != nil {
			panic(err)
		}
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
		if err := made.Execute(&text, asked.Data); err != nil {
			panic(err)
		}
		out.Encode(text.String())
	}
}
